-- Calls to providers. begin_calls commits what will be sent before it is sent; record_event_results takes what came of
-- it. No transaction is open in between. What happens if the worker dies there: the call's row says that it was sent
-- and not answered, so the next worker sends the same bytes under the same key, or asks.

create or replace function surety.begin_calls(
    p_batch bigint, p_fence bigint, p_operation text, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, payment_id text, todo text, operation text, idempotency_key text, request jsonb, account text,
    provider_id text,
    sends integer, first_sent_at timestamptz, last_sent_at timestamptz, failures integer, amount_minor bigint,
    currency text, livemode boolean, state text
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- For each event left in the batch (of p_event_ids, if given), what to do about its payment:
--   send   the request, under the key, both as they were written down
--   ask    the provider first: an earlier send's outcome is unknown and sending again would not tell
--   find   it, and if it isn't there, end the payment: it was canceled before the provider answered
--   wait   until it is known whether the provider holds the payment
--   skip   nothing is left to do
-- An intent beside the payment's own (payment.orphan_found) is canceled by a call of its own, `cancel:pi_…`.
-- Steps initiated payments to submitting. Returns nothing when the lease is another's by now.
declare
    v_now timestamptz := surety.time_now();
begin
    perform from surety.payments as p
    where p.id in (
        select e.aggregate_id from outbox.batch_events(p_batch, p_fence) as e
        where p_event_ids is null or e.event_id = any(p_event_ids)
    )
    order by p.id for update;
    return query
    with events as (
        select
            e.event_id, e.failures, e.type, p.id as payment_id, p.state, p.captured_minor, p as payment,
            p.flags ? 'cancel_requested_at' as is_called_off, asked.revision as capture_revision,
            c.first_sent_at, c.last_sent_at, c.answered_at, c.status, c.payment_id is not null as was_sent,
            about.operation, coalesce(e.payload ->> 'object_id', p.provider_id) as object_id,
            row_number() over (
                partition by p.id, about.operation, e.type = 'payment.authorized_late' order by e.event_id
            ) as turn
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.payments as p on p.id = e.aggregate_id
        cross join lateral (
            select p_operation || coalesce(':' || (e.payload ->> 'object_id'), '') as operation
        ) as about
        left join surety.calls as c on c.payment_id = p.id and c.operation = about.operation
        left join lateral surety.pending_capture(p.id) as asked on p_operation in ('capture', 'cancel')
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    judged as (
        select
            e.*,
            case
                -- Two events may ask for one cancellation.
                when e.turn > 1 then 'skip'
                when p_operation = 'create' and e.state not in ('initiated', 'submitting') then 'skip'
                when p_operation = 'create' and e.is_called_off and e.was_sent then 'find'
                when p_operation = 'confirm' and (e.state <> 'provider_submitted' or e.is_called_off) then 'skip'
                when p_operation = 'capture' and (e.state <> 'processing' or e.capture_revision is null) then 'skip'
                when e.type = 'payment.orphan_found' and e.object_id = (e.payment).provider_id then 'skip'
                when p_operation = 'cancel' and e.type = 'payment.authorized_late' and (
                    e.captured_minor > 0 or e.state not in ('failed', 'canceled') or (e.payment).provider_id is null
                ) then 'skip'
                when e.operation = 'cancel' and e.type <> 'payment.authorized_late' and e.state = 'submitting'
                    then 'wait'
                when e.operation = 'cancel' and e.type <> 'payment.authorized_late' and (
                    e.captured_minor > 0 or e.capture_revision is not null
                    or e.state not in ('provider_submitted', 'requires_action', 'authorized', 'processing')
                ) then 'skip'
                when not e.was_sent then 'send'
                -- A key's first answer is replayed for 24 hours at least, server errors included.
                when p_operation = 'create' and e.first_sent_at > v_now - interval '23 hours'
                    and coalesce(e.status, 0) < 500
                    then 'send'
                when p_operation <> 'create' and e.answered_at is not null and e.status between 400 and 499 then 'send'
                else 'ask'
            end as verdict
        from events as e
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select
            j.payment_id, j.operation,
            j.payment_id || ':' || j.operation
            || case when p_operation = 'capture' and j.capture_revision > 0 then ':' || j.capture_revision else '' end,
            surety.stripe_request(j.payment, j.operation)::text, v_now, v_now
        from judged as j where j.verdict not in ('skip', 'wait')
        order by j.payment_id, j.operation
        on conflict on constraint calls_pkey do update
        set
            sends = c.sends + 1,
            last_sent_at = excluded.last_sent_at,
            -- While it is only asked about, the last answer still decides whether the key can be used again.
            (answered_at, status) = (
                select c.answered_at, c.status from judged as a
                where a.payment_id = c.payment_id and a.operation = c.operation and a.verdict in ('ask', 'find')
            )
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends, c.first_sent_at, c.last_sent_at
    ),
    stepped as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select j.payment_id, (j.payment).version + 1, 'initiated', 'submitting', 'command', v_now, p_actor
        from judged as j where j.verdict not in ('skip', 'wait') and j.state = 'initiated'
        order by j.payment_id
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, j.payment_id, (j.payment).merchant_id,
            case when j.verdict in ('ask', 'find') then 'asked' else 'sent' end,
            jsonb_build_object('operation', j.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from judged as j
        join written as w on w.payment_id = j.payment_id and w.operation = j.operation
            and j.verdict not in ('skip', 'wait')
    )
    select
        j.event_id, j.payment_id, j.verdict, j.operation, w.idempotency_key, w.request::jsonb,
        (j.payment).provider_account, j.object_id, w.sends, w.first_sent_at,
        coalesce(j.last_sent_at, w.last_sent_at), j.failures, (j.payment).amount_minor, (j.payment).currency,
        (j.payment).livemode, j.state
    from judged as j
    left join written as w on w.payment_id = j.payment_id and w.operation = j.operation
        and j.verdict not in ('skip', 'wait')
    order by j.event_id;
end;
$$;

create or replace function surety.renew_call_key(p_payment_id text, p_operation text) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    update surety.calls
    set
        idempotency_key = calls.payment_id || ':' || calls.operation || ':' || calls.sends,
        first_sent_at = surety.time_now(),
        last_sent_at = surety.time_now(),
        answered_at = null,
        status = null
    where calls.payment_id = p_payment_id and calls.operation = p_operation
    returning calls.idempotency_key;
end;

comment on function surety.renew_call_key(text, text) is
'A fresh key for a call that was asked about and that the provider does not know of. Returns the key.';

create or replace function surety.begin_refunds(
    p_batch bigint, p_fence bigint, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, refund_id text, refund_minor bigint, payment_id text, todo text, idempotency_key text,
    request jsonb, account text, provider_id text, first_sent_at timestamptz, last_sent_at timestamptz,
    amount_minor bigint, currency text, livemode boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- As surety.begin_calls, for refunds that were asked for here:
--   send   the request, under the key, both as they were written down
--   ask    whether the provider has it; if not, send it again, the same
--   renew  likewise, but under a fresh key: what the old one would replay is no answer
--   skip   nothing is left to do
declare
    v_now timestamptz := surety.time_now();
begin
    perform from surety.payments as p
    where p.id in (
        select e.payload ->> 'payment_id' from outbox.batch_events(p_batch, p_fence) as e
        where p_event_ids is null or e.event_id = any(p_event_ids)
    )
    order by p.id for update;
    return query
    with events as (
        select
            e.event_id, r.id as refund_id, r as refund, p as payment,
            c.first_sent_at, c.last_sent_at, c.answered_at, c.status, c.payment_id is not null as was_sent
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.refunds as r on r.id = e.aggregate_id
        join surety.payments as p on p.id = r.payment_id
        left join surety.calls as c on c.payment_id = r.payment_id and c.operation = 'refund:' || r.id
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    judged as (
        select
            e.*,
            case
                when (e.refund).state <> 'pending' or (e.refund).provider_id is not null then 'skip'
                when not e.was_sent or e.status between 400 and 499 then 'send'
                when e.status >= 500 or e.first_sent_at < v_now - interval '23 hours' then 'renew'
                else 'ask'
            end as verdict
        from events as e
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select
            (j.payment).id, 'refund:' || j.refund_id, j.refund_id || ':create',
            jsonb_strip_nulls(jsonb_build_object(
                'payment_intent', (j.payment).provider_id,
                'amount', (j.refund).amount_minor,
                'reason', (j.refund).reason,
                'metadata', jsonb_build_object(
                    'surety_refund', j.refund_id,
                    'surety_payment', (j.payment).id,
                    'surety_environment', (select i.id from surety.environment as i)
                )))::text,
            v_now, v_now
        from judged as j where j.verdict <> 'skip'
        order by (j.payment).id, j.refund_id
        on conflict on constraint calls_pkey do update
        set
            sends = c.sends + 1,
            last_sent_at = excluded.last_sent_at,
            -- While it is only asked about, the last answer still decides whether the key can be used again.
            (answered_at, status) = (
                select c.answered_at, c.status from judged as a
                where 'refund:' || a.refund_id = c.operation and a.verdict = 'renew'
            )
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends, c.first_sent_at, c.last_sent_at
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, w.payment_id, (j.payment).merchant_id,
            case j.verdict when 'send' then 'sent' else 'asked' end,
            jsonb_build_object('operation', w.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from judged as j join written as w on w.operation = 'refund:' || j.refund_id
    )
    select
        j.event_id, j.refund_id, (j.refund).amount_minor, (j.payment).id, j.verdict, w.idempotency_key,
        w.request::jsonb, (j.payment).provider_account, (j.payment).provider_id, w.first_sent_at,
        coalesce(j.last_sent_at, w.last_sent_at), (j.payment).amount_minor, (j.payment).currency, (j.payment).livemode
    from judged as j left join written as w on w.operation = 'refund:' || j.refund_id
    order by j.event_id;
end;
$$;

create or replace function surety.begin_evidence(
    p_batch bigint, p_fence bigint, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, dispute_id text, payment_id text, todo text, operation text, idempotency_key text, request jsonb,
    account text, provider_id text, livemode boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- As surety.begin_calls. All that was given so far is sent, so only the last event of a dispute does anything; sending
-- it twice is telling it once. renew: what the key would replay is no answer.
declare
    v_now timestamptz := surety.time_now();
begin
    return query
    with events as (
        select
            e.event_id, d as dispute, p.livemode, c.status,
            'evidence:' || d.id || ':' || d.evidence_revision as operation,
            case
                when (e.payload ->> 'evidence_revision')::integer <> d.evidence_revision or s.status is null then 'skip'
                when c.status >= 500 or c.first_sent_at < v_now - interval '23 hours' then 'renew'
                else 'send'
            end as verdict
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.disputes as d on d.id = e.aggregate_id
        join surety.payments as p on p.id = d.payment_id
        left join surety.dispute_statuses as s on s.status = d.status and s.takes_evidence
        left join surety.calls as c on c.payment_id = d.payment_id
            and c.operation = 'evidence:' || d.id || ':' || d.evidence_revision
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select
            (e.dispute).payment_id, e.operation, e.operation,
            jsonb_build_object(
                'evidence', (e.dispute).evidence, 'submit', (e.dispute).submit_asked_at is not null)::text,
            v_now, v_now
        from events as e where e.verdict <> 'skip'
        order by (e.dispute).payment_id, e.operation
        on conflict on constraint calls_pkey do update
        set sends = c.sends + 1, last_sent_at = excluded.last_sent_at, answered_at = null, status = null
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, w.payment_id, (e.dispute).merchant_id, 'sent',
            jsonb_build_object('operation', w.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from events as e join written as w on w.operation = e.operation and e.verdict <> 'skip'
    )
    select
        e.event_id, (e.dispute).id, (e.dispute).payment_id, e.verdict, e.operation, w.idempotency_key,
        w.request::jsonb, (e.dispute).provider_account, (e.dispute).provider_id, e.livemode
    from events as e left join written as w on w.operation = e.operation and e.verdict <> 'skip'
    order by e.event_id;
end;
$$;
