-- What merchants ask for once a payment is under way: capture it, cancel it. A transaction per request, for these are
-- rarer than payments.
--
--   admit      whose key it is; the Idempotency-Key is ours now, or its first answer is given again
--   command    looks at the locked payment, writes what was asked for as a fact or a flag, and the event for a worker
--   conclude   keeps the answer beside its effect; refuse gives the key back, for nothing took effect
--
-- p_request: {"key_hash" (hex), "request_id", "address", "idempotency_key", "request_hash" (hex, of the id and the
-- body), and the id of what it is about}. Locks: idempotency key, payment, refund, accounts.

create or replace function api.admit(p_route text, p_request jsonb) returns api.admission
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
    from api.identify(decode(p_request ->> 'key_hash', 'hex')) as k;
    if not found then
        v_outcome := (401, 'unauthenticated', null, null, false);
    elsif v_who.is_suspended then
        v_outcome := (403, 'forbidden', null, null, false);
    else
        -- Waits for another request with this key; if that one was refused, the key is free again.
        loop
            insert into surety.idempotency_keys (
                merchant_id, route, key, request_hash, payment_id, status, response, created_at
            )
            values (v_who.merchant_id, p_route, p_request ->> 'idempotency_key', v_hash, '', 0, '', v_now)
            on conflict (merchant_id, route, key) do nothing;
            exit when found;
            select i.request_hash, i.status, i.response into v_first
            from surety.idempotency_keys as i
            where i.merchant_id = v_who.merchant_id and i.route = p_route and i.key = p_request ->> 'idempotency_key';
            continue when not found;
            if v_first.request_hash = v_hash then
                v_outcome := (v_first.status, null, null, v_first.response, true);
            else
                v_outcome := (422, 'idempotency-key-reused', null, null, false);
            end if;
            exit;
        end loop;
    end if;
    return (
        v_who.merchant_id, 'key:' || v_who.key_id, p_route, p_request ->> 'idempotency_key', v_now, v_outcome
    )::api.admission;
end;
$$;

create or replace function api.refuse(p_admitted api.admission, p_status integer, p_problem text, p_detail jsonb)
returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    delete from surety.idempotency_keys as i
    where i.merchant_id = p_admitted.merchant_id and i.route = p_admitted.route and i.key = p_admitted.key;
    return (p_status::smallint, p_problem, p_detail, null, false)::api.outcome;
end;
$$;

create or replace function api.conclude(
    p_admitted api.admission, p_request jsonb, p_payment_id text, p_status integer, p_body text, p_snapshot jsonb
) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.idempotency_keys as i
    set payment_id = p_payment_id, status = p_status, response = p_body
    where i.merchant_id = p_admitted.merchant_id and i.route = p_admitted.route and i.key = p_admitted.key;
    insert into audit.entries (
        id, at, kind, actor, address, request_id, payment_id, merchant_id, outcome, snapshot
    )
    values (
        surety.new_id('aud', p_admitted.admitted_at), p_admitted.admitted_at, 'request', p_admitted.actor,
        p_request ->> 'address', p_request ->> 'request_id', p_payment_id, p_admitted.merchant_id, 'accepted',
        jsonb_build_object('route', p_admitted.route, 'idempotency_key', p_admitted.key) || p_snapshot
    );
    return (p_status::smallint, null, null, p_body, false)::api.outcome;
end;
$$;

create or replace function api.capture_payment(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- {…, "payment_id", "amount"?}: captures what is held, or a part of it, once. 202 and the payment, in processing.
-- 404 not-found   409 wrong-state, detail {state}   400 invalid-request: more than is held
declare
    v_admitted api.admission := api.admit('POST /v1/payments/{id}/capture', p_request);
    v_payment surety.payments;
    v_held bigint;
    v_amount bigint;
begin
    if (v_admitted.outcome).status is not null then
        return v_admitted.outcome;
    end if;
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse(v_admitted, 404, 'not-found', null);
    end if;
    if v_payment.state <> 'authorized' or v_payment.flags ? 'cancel_requested_at' then
        return api.refuse(v_admitted, 409, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.flags ? 'cancel_requested_at' then 'its cancellation was asked for' end));
    end if;
    select least(v_payment.amount_minor, max(f.amount_minor)) into v_held
    from surety.facts as f
    where f.payment_id = v_payment.id and f.kind = 'authorized' and f.disregarded is null;
    v_amount := coalesce((p_request ->> 'amount')::bigint, v_held);
    if v_amount not between 1 and v_held then
        return api.refuse(v_admitted, 400, 'invalid-request', jsonb_build_object(
            'field', '/amount', 'rule', case when v_amount < 1 then 'minimum' else 'maximum' end,
            'limit', case when v_amount < 1 then 1 else v_held end, 'given', v_amount, 'currency', v_payment.currency));
    end if;
    perform surety.request_capture(v_payment, v_amount, v_admitted.actor, p_request ->> 'request_id');
    return api.conclude(
        v_admitted, p_request, v_payment.id, 202,
        (
            select shown.document::text
            from surety.payments as p cross join lateral api.show_payment(p) as shown
            where p.id = v_payment.id
        ),
        jsonb_build_object('amount', v_amount, 'currency', v_payment.currency));
end;
$$;

create or replace function surety.request_capture(
    p_payment surety.payments, p_amount_minor bigint, p_actor text, p_request_id text
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Our command is a fact too: so what the provider says meanwhile, in whatever order, can't undo the step to processing.
-- The payment is locked. Its object is our own; its revision counts the commands, for one that was refused may be
-- followed by another.
declare
    v_now timestamptz := surety.time_now();
    v_object constant text := p_payment.id || ':capture';
    v_fact text := surety.new_id('fct', v_now);
    v_revision integer := surety.next_revision(
        p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object);
begin
    insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
    values (
        p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object, 'capture_requested', v_revision,
        v_fact
    );
    insert into surety.facts (
        id, payment_id, provider, account, livemode, object_id, kind, revision, amount_minor, currency, source,
        source_id, recorded_at
    )
    values (
        v_fact, p_payment.id, p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object,
        'capture_requested', v_revision, p_amount_minor, p_payment.currency, 'request', p_request_id, v_now
    );
    delete from surety.calls as c where c.payment_id = p_payment.id and c.operation = 'capture';
    perform surety.advance(
        array(select d from surety.derive(array[p_payment.id]) as d), 'command', p_actor, p_request_id);
    perform outbox.emit(
        'payment', p_payment.id, 'payment.capture_requested',
        jsonb_build_object('payment_id', p_payment.id, 'amount', p_amount_minor), null, null);
end;
$$;

create or replace function api.cancel_payment(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- {…, "payment_id"}: 200 and the payment, canceled, if nothing was sent yet; else 202 and the payment as it is, and the
-- provider will be asked to call it off: the payment may turn out to have succeeded before.
-- 404 not-found   409 wrong-state, detail {state}
declare
    v_admitted api.admission := api.admit('POST /v1/payments/{id}/cancel', p_request);
    v_payment surety.payments;
    v_status integer := 202;
begin
    if (v_admitted.outcome).status is not null then
        return v_admitted.outcome;
    end if;
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse(v_admitted, 404, 'not-found', null);
    end if;
    if v_payment.state = 'initiated' then
        v_status := 200;
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor, request_id)
        values (
            v_payment.id, v_payment.version + 1, 'initiated', 'canceled', 'command', v_admitted.admitted_at,
            v_admitted.actor, p_request ->> 'request_id'
        );
    elsif v_payment.state not in ('submitting', 'provider_submitted', 'requires_action', 'authorized') then
        return api.refuse(v_admitted, 409, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.state = 'processing' then 'it is being processed' end));
    elsif not v_payment.flags ? 'cancel_requested_at' then
        update surety.payments as p
        set flags = p.flags || jsonb_build_object('cancel_requested_at', surety.iso(v_admitted.admitted_at))
        where p.id = v_payment.id;
        perform outbox.emit(
            'payment', v_payment.id, 'payment.cancel_requested',
            jsonb_build_object('payment_id', v_payment.id, 'reason', 'requested'), null, null);
    end if;
    return api.conclude(
        v_admitted, p_request, v_payment.id, v_status,
        (
            select shown.document::text
            from surety.payments as p cross join lateral api.show_payment(p) as shown
            where p.id = v_payment.id
        ),
        '{}');
end;
$$;
