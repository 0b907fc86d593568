-- Idempotent commands: capture, cancel, refund, submit evidence. Each is a transaction of its own.
--
--   admit_command      finds the merchant and takes the Idempotency-Key, or returns its first answer
--   the command        checks the locked payment; writes a fact or a flag, and the event for a worker
--   complete_command   stores the answer with its effect and audits the request
--   refuse_command     gives the key back, because nothing took effect
--
-- Locks: idempotency key, payment, refund, accounts.

create or replace function api.admit_command(
    p_route text, p_scope text, p_request jsonb, p_takes_money boolean default false
) returns api.admission
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_hash bytea := decode(p_request ->> 'request_hash', 'hex');
    v_who record;
    v_first record;
    v_outcome api.outcome;
begin
    select k.key_id, k.merchant_id, k.is_suspended into v_who
    from api.identify_merchant(decode(p_request ->> 'key_hash', 'hex'), p_scope, p_request ->> 'address') as k;
    if not found then
        v_outcome := (
            null, api.explain_denial(decode(p_request ->> 'key_hash', 'hex'), p_scope, p_request ->> 'address'),
            null, null, false
        );
    else
        -- Waits for another request with this key; if that one was refused, the key is free again.
        loop
            insert into surety.idempotency_keys (
                merchant_id, route, key, request_hash, payment_id, status, response, created_at
            )
            values (v_who.merchant_id, p_route, p_request ->> 'idempotency_key', v_hash, '', 0, '', v_now)
            on conflict (merchant_id, route, key) do nothing;
            if found then
                if p_request ? 'traceparent' then
                    perform outbox.keep_traceparents(jsonb_build_object('', p_request ->> 'traceparent'));
                end if;
                exit;
            end if;
            select i.request_hash, i.status, i.response into v_first
            from surety.idempotency_keys as i
            where i.merchant_id = v_who.merchant_id and i.route = p_route and i.key = p_request ->> 'idempotency_key';
            continue when not found;
            perform surety.await_standbys();
            if v_first.request_hash = v_hash then
                v_outcome := (v_first.status, null, null, v_first.response, true);
            else
                v_outcome := (null, 'idempotency-key-reused', null, null, false);
            end if;
            exit;
        end loop;
        -- Behind the key, so that a repetition gets its first answer.
        if v_outcome is null and v_who.is_suspended and p_takes_money then
            delete from surety.idempotency_keys as i
            where i.merchant_id = v_who.merchant_id and i.route = p_route and i.key = p_request ->> 'idempotency_key';
            v_outcome := (null, 'merchant-suspended', null, null, false);
        end if;
    end if;
    return (
        v_who.merchant_id, 'key:' || v_who.key_id, p_route, p_request ->> 'idempotency_key', v_now, v_outcome
    )::api.admission;
end;
$$;

comment on function api.admit_command(text, text, jsonb, boolean) is
'Admits a command that needs p_scope; a suspended merchant''s only if it takes no money from a payer. p_request:
key_hash (hex), request_id, address, api_version, idempotency_key, request_hash (hex, of the id and the body), the id
of the object, and the traceparent of the events that it causes, if the request has one. The outcome is set if the
command ends here: an answer repeated, or one of the problems of api.explain_denial, merchant-suspended,
idempotency-key-reused.';

create or replace function api.refuse_command(p_admitted api.admission, p_problem text, p_detail jsonb)
returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    delete from surety.idempotency_keys as i
    where i.merchant_id = p_admitted.merchant_id and i.route = p_admitted.route and i.key = p_admitted.key;
    return (null, p_problem, p_detail, null, false)::api.outcome;
end;
$$;

comment on function api.refuse_command(api.admission, text, jsonb) is
'Refuses an admitted command: its Idempotency-Key is free again. p_detail: details of the problem.';

create or replace function api.complete_command(
    p_admitted api.admission, p_request jsonb, p_payment_id text, p_status integer, p_body text, p_snapshot jsonb
) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.idempotency_keys as i
    set payment_id = coalesce(p_payment_id, p_snapshot ->> 'customer', ''), status = p_status, response = p_body
    where i.merchant_id = p_admitted.merchant_id and i.route = p_admitted.route and i.key = p_admitted.key;
    perform audit.write_entry(
        'request', p_admitted.actor, 'accepted',
        p_payment_id => p_payment_id, p_merchant_id => p_admitted.merchant_id,
        p_address => p_request ->> 'address', p_request_id => p_request ->> 'request_id',
        p_snapshot => jsonb_build_object(
            'route', p_admitted.route, 'api_version', p_request ->> 'api_version', 'idempotency_key', p_admitted.key
        ) || p_snapshot);
    return (p_status::smallint, null, null, p_body, false)::api.outcome;
end;
$$;

comment on function api.complete_command(api.admission, jsonb, text, integer, text, jsonb) is
'Completes an admitted command: stores status and body under its Idempotency-Key, and audits it with p_snapshot. The key
keeps the id of the payment, or without one that of the customer in p_snapshot.';

create or replace function surety.delete_expired_idempotency_keys(p_limit integer default 10000) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with deleted as (
        delete from surety.idempotency_keys
        where ctid = any(array(
            select old.ctid from surety.idempotency_keys as old
            where old.created_at < surety.time_now() - interval '30 days'
            limit p_limit
            for update skip locked
        ))
        returning idempotency_keys.key
    )

    select count(*)::integer from deleted;
end;

comment on function surety.delete_expired_idempotency_keys(integer) is
'Deletes up to p_limit Idempotency-Keys that are older than 30 days; returns how many.';
