-- The client secret of a payment whose payer acts by the provider's script. The head of
-- db/sql/provider/client_secrets.sql has the way of a request.

create or replace function api.request_client_secret(p_request jsonb)
returns table (problem text, detail jsonb, secret_request_id text, provider_id text, provider_account text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_route constant text := 'POST /v1/payments/{id}/client_secret';
    v_hour_max constant integer := 10;
    v_now constant timestamptz := surety.time_now();
    v_hash constant bytea := decode(p_request ->> 'key_hash', 'hex');
    v_who record;
    v_payment surety.payments;
    v_reason text;
    v_counted_at timestamptz;
begin
    select k.key_id, k.merchant_id, k.is_suspended into v_who
    from api.identify_merchant(v_hash, 'payments:write', p_request ->> 'address') as k;
    if not found then
        problem := api.explain_denial(v_hash, 'payments:write', p_request ->> 'address');
        return next;
        return;
    end if;
    -- The lock lets requests about one payment count each other.
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_who.merchant_id
    for no key update;
    if not found then
        problem := 'not-found';
        return next;
        return;
    end if;
    if v_who.is_suspended then
        problem := 'merchant-suspended';
        return next;
        return;
    end if;
    v_reason := case
        when v_payment.authentication <> 'script' then 'its payer acts by redirect, not by script'
        when v_payment.state <> 'requires_action' then 'its payer need not act'
        when v_payment.flags ? 'cancel_requested_at' then 'its cancellation was requested'
        when v_payment.next_action ->> 'type' is distinct from 'script' then 'its payer acts otherwise than by script'
    end;
    if v_reason is not null then
        problem := 'wrong-state';
        detail := jsonb_build_object('state', v_payment.state, 'reason', v_reason);
        return next;
        return;
    end if;
    v_counted_at := (
        select e.at from audit.entries as e
        where e.payment_id = v_payment.id and e.id >= surety.id_at('aud', v_now - interval '1 hour')
            and e.kind = 'request' and e.snapshot ->> 'route' = v_route
        order by e.id desc
        offset v_hour_max - 1
        limit 1
    );
    if v_counted_at is not null then
        problem := 'rate-limited';
        detail := jsonb_build_object(
            'limit', v_hour_max,
            'retry_after', greatest(1, ceil(extract(epoch from v_counted_at + interval '1 hour' - v_now)))::integer);
        return next;
        return;
    end if;
    perform surety.delete_old_secret_requests();
    secret_request_id := surety.new_id('csr', v_now);
    provider_id := v_payment.provider_id;
    provider_account := v_payment.provider_account;
    insert into surety.client_secret_requests (id, payment_id, merchant_id, public_key, requested_at)
    values (
        secret_request_id, v_payment.id, v_who.merchant_id, decode(p_request ->> 'public_key', 'hex'), v_now
    );
    if p_request ? 'traceparent' then
        perform outbox.keep_traceparents(jsonb_build_object('', p_request ->> 'traceparent'));
    end if;
    perform outbox.emit_event(
        'payment', v_payment.id, 'payment.client_secret_requested',
        jsonb_build_object('payment_id', v_payment.id, 'secret_request_id', secret_request_id), null, null);
    perform audit.write_entry(
        'request', 'key:' || v_who.key_id, 'accepted',
        p_payment_id => v_payment.id, p_merchant_id => v_who.merchant_id,
        p_address => p_request ->> 'address', p_request_id => p_request ->> 'request_id',
        p_snapshot => jsonb_build_object('route', v_route, 'api_version', p_request ->> 'api_version'));
    return next;
end;
$$;

comment on function api.request_client_secret(jsonb) is
'Asks a worker for the client secret of a payment in requires_action by script, and audits that it was asked for. The
merchant then waits for the row with this id. p_request: key_hash (hex), request_id, address, api_version, payment_id,
public_key (32 bytes, hex), for which the worker seals the secret. Problems: those of api.explain_denial; not-found;
merchant-suspended; wrong-state, detail {state, reason}; rate-limited, detail {limit, retry_after (seconds)}: ten in an
hour for a payment.';

create or replace function api.take_client_secret(p_key_hash bytea, p_secret_request_id text, p_address text)
returns table (sealed bytea, failure text, state text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with taken as (
        delete from surety.client_secret_requests
        using api.identify_merchant(p_key_hash, 'payments:write', p_address) as who
        where client_secret_requests.id = p_secret_request_id and client_secret_requests.merchant_id = who.merchant_id
        returning
            client_secret_requests.payment_id,
            client_secret_requests.sealed,
            client_secret_requests.failure
    )

    select
        taken.sealed,
        taken.failure,
        payments.state
    from taken
    inner join surety.payments on taken.payment_id = payments.id;
end;

comment on function api.take_client_secret(bytea, text, text) is
'Ends a request for a client secret: the sealed secret or why there is none, both null if no worker has answered, and
the present state of the payment. No row: it is another merchant''s, the key is not valid, or the row is gone.';
