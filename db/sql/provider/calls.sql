-- Calls to providers, before they are sent.
--
--   plan    surety.plan_payment_calls, plan_refund_calls, plan_evidence_calls: a verdict for each event of a batch
--   begin   surety.begin_calls commits what will be sent; no transaction is open while it is sent
--   record  surety.record_results (db/sql/provider/results.sql) takes the results
--
-- A worker that dies in between leaves a call that was sent and not answered. The next worker sends the same request
-- under the same key, or reads the object first. surety.call_verdicts lists the verdicts with their meanings.

create or replace function surety.plan_call(
    p_event_id text, p_subject_id text, p_verdict text, p_operation text, p_idempotency_key text, p_request jsonb,
    p_provider_id text, p_last_sent_at timestamptz, p_payment surety.payments
) returns surety.planned_call
language sql immutable
begin atomic
    select row(
        p_event_id, p_subject_id, p_verdict, p_operation, p_idempotency_key, p_request, p_provider_id, p_last_sent_at,
        p_payment
    )::surety.planned_call;
end;

comment on function surety.plan_call(text, text, text, text, text, jsonb, text, timestamptz, surety.payments) is
'A surety.planned_call by the names of its fields.';

create or replace function surety.call_key_lifetime() returns interval
language sql immutable parallel safe
begin atomic
    select interval '23 hours';
end;

comment on function surety.call_key_lifetime() is
'How long after the first send a call''s Idempotency-Key may be sent again. Stripe keeps a key for 24 hours at least;
the last hour is a margin for requests under way and for clocks that differ.';

create or replace function surety.plan_payment_calls(
    p_batch bigint, p_fence bigint, p_operation text, p_event_ids text[]
) returns surety.planned_call[]
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    return (
        with events as (
            select
                e.event_id, e.type, p as payment, p.state, p.captured_minor,
                p.flags ? 'cancel_requested_at' as is_cancel_requested, p.flags #>> '{hold,status}' as hold,
                requested.revision as capture_revision,
                c.first_sent_at, c.last_sent_at, c.answered_at, c.status, c.payment_id is not null as was_sent,
                named.operation, coalesce(e.payload ->> 'object_id', p.provider_id) as object_id,
                row_number() over (
                    partition by
                        p.id, named.operation, e.type = 'payment.authorized_late', e.type = 'payment.released'
                    order by e.event_id
                ) as turn
            from outbox.batch_events(p_batch, p_fence) as e
            join surety.payments as p on p.id = e.aggregate_id
            cross join lateral (
                -- A second intent (payment.orphan_found) is canceled by a call of its own, `cancel:pi_…`.
                select p_operation || coalesce(':' || (e.payload ->> 'object_id'), '') as operation
            ) as named
            left join surety.calls as c on c.payment_id = p.id and c.operation = named.operation
            left join lateral surety.pending_capture(p.id) as requested on p_operation in ('capture', 'cancel')
            where p_event_ids is null or e.event_id = any(p_event_ids)
        ),
        judged as (
            select
                e.*,
                case
                    -- Two events may request the same cancellation.
                    when e.turn > 1 then 'skip'
                    when p_operation = 'create' and e.state not in ('initiated', 'submitting') then 'skip'
                    -- Only the event of its release sends a payment that is or was on hold: so it is sent once.
                    when p_operation = 'create' and e.hold is not null
                        and (e.hold <> 'released' or e.type <> 'payment.released')
                        then 'skip'
                    -- The provider held it before a decision: it must not charge it.
                    when p_operation = 'confirm' and e.hold = 'overtaken' then 'skip'
                    when p_operation = 'create' and e.is_cancel_requested and e.was_sent then 'find'
                    when p_operation = 'confirm' and (e.state <> 'provider_submitted' or e.is_cancel_requested)
                        then 'skip'
                    when p_operation = 'capture' and (e.state <> 'processing' or e.capture_revision is null) then 'skip'
                    when e.type = 'payment.orphan_found' and e.object_id = (e.payment).provider_id then 'skip'
                    when p_operation = 'cancel' and e.type = 'payment.authorized_late' and (
                        e.captured_minor > 0 or e.state not in ('failed', 'canceled')
                        or (e.payment).provider_id is null
                    ) then 'skip'
                    when e.operation = 'cancel' and e.type <> 'payment.authorized_late' and e.state = 'submitting'
                        then 'wait'
                    when e.operation = 'cancel' and e.type <> 'payment.authorized_late' and (
                        e.captured_minor > 0 or e.capture_revision is not null
                        or e.state not in ('provider_submitted', 'requires_action', 'authorized', 'processing')
                    ) then 'skip'
                    when p_operation = 'create' and not e.was_sent and exists (
                        select from surety.customers as u
                        where u.id = (e.payment).customer_id and u.provider_id is null
                    ) then 'needs_customer'
                    when not e.was_sent then 'send'
                    -- A key's first answer is replayed, server errors included.
                    when p_operation = 'create' and e.first_sent_at > v_now - surety.call_key_lifetime()
                        and coalesce(e.status, 0) < 500
                        then 'send'
                    -- The last send was refused. An earlier one may have been executed, so the key must still be known.
                    when p_operation <> 'create' and e.answered_at is not null and e.status between 400 and 499
                        and e.first_sent_at > v_now - surety.call_key_lifetime()
                        then 'send'
                    else 'replace_key'
                end as verdict
            from events as e
        )
        select array_agg(surety.plan_call(
            p_event_id => j.event_id,
            p_subject_id => (j.payment).id,
            p_verdict => j.verdict,
            p_operation => j.operation,
            p_idempotency_key => (j.payment).id || ':' || j.operation
                || case when p_operation = 'capture' and j.capture_revision > 0 then ':' || j.capture_revision else ''
                end,
            p_request => case
                when j.verdict not in ('skip', 'wait', 'needs_customer')
                    then surety.stripe_request(j.payment, j.operation)
            end,
            p_provider_id => j.object_id,
            p_last_sent_at => j.last_sent_at,
            p_payment => j.payment
        ))
        from judged as j
    );
end;
$$;

comment on function surety.plan_payment_calls(bigint, bigint, text, text[]) is
'The calls that create, confirm, capture or cancel the payments of a batch''s events, a verdict for each event.';

create or replace function surety.plan_refund_calls(p_batch bigint, p_fence bigint, p_event_ids text[])
returns surety.planned_call[]
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    return (
        select array_agg(surety.plan_call(
            p_event_id => e.event_id,
            p_subject_id => r.id,
            p_verdict => case
                when r.state <> 'pending' or r.provider_id is not null then 'skip'
                when c.payment_id is null then 'send'
                when c.status >= 500 or c.first_sent_at <= v_now - surety.call_key_lifetime() then 'replace_key'
                -- The last send was refused. An earlier one may have been executed: the same key finds its answer.
                when c.status between 400 and 499 then 'send'
                else 'ask'
            end,
            p_operation => 'refund:' || r.id,
            p_idempotency_key => r.id || ':create',
            p_request => surety.stripe_refund_request(r, p.provider_id),
            p_provider_id => p.provider_id,
            p_last_sent_at => c.last_sent_at,
            p_payment => p
        ))
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.refunds as r on r.id = e.aggregate_id
        join surety.payments as p on p.id = r.payment_id
        left join surety.calls as c on c.payment_id = r.payment_id and c.operation = 'refund:' || r.id
        where p_event_ids is null or e.event_id = any(p_event_ids)
    );
end;
$$;

comment on function surety.plan_refund_calls(bigint, bigint, text[]) is
'The calls that make the refunds of a batch''s events, a verdict for each event.';

create or replace function surety.plan_evidence_calls(p_batch bigint, p_fence bigint, p_event_ids text[])
returns surety.planned_call[]
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
-- Each request holds all evidence given so far. Therefore only the last event of a dispute has a call, and repeating it
-- does no harm.
declare
    v_now timestamptz := surety.time_now();
begin
    return (
        select array_agg(surety.plan_call(
            p_event_id => e.event_id,
            p_subject_id => d.id,
            p_verdict => case
                when (e.payload ->> 'evidence_revision')::integer <> d.evidence_revision or s.status is null then 'skip'
                when c.status >= 500 or c.first_sent_at <= v_now - surety.call_key_lifetime() then 'replace_key'
                else 'send'
            end,
            p_operation => named.operation,
            p_idempotency_key => named.operation,
            p_request => surety.stripe_evidence_request(d),
            p_provider_id => d.provider_id,
            p_last_sent_at => c.last_sent_at,
            p_payment => p
        ))
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.disputes as d on d.id = e.aggregate_id
        join surety.payments as p on p.id = d.payment_id
        cross join lateral (select 'evidence:' || d.id || ':' || d.evidence_revision as operation) as named
        left join surety.dispute_statuses as s on s.status = d.status and s.takes_evidence
        left join surety.calls as c on c.payment_id = d.payment_id and c.operation = named.operation
        where p_event_ids is null or e.event_id = any(p_event_ids)
    );
end;
$$;

comment on function surety.plan_evidence_calls(bigint, bigint, text[]) is
'The calls that submit the evidence of a batch''s events, a verdict for each event.';

create or replace function surety.begin_calls(
    p_batch bigint, p_fence bigint, p_operation text, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, subject_id text, payment_id text, verdict text, operation text, idempotency_key text, request jsonb,
    account text, provider_id text, first_sent_at timestamptz, last_sent_at timestamptz, send_number integer,
    amount_minor bigint, currency text, livemode boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
    v_planned surety.planned_call [];
begin
    -- Evidence depends on the dispute alone, so its payment is not locked.
    if p_operation <> 'evidence' then
        perform from surety.payments as p
        where p.id in (
            select case when p_operation = 'refund' then e.payload ->> 'payment_id' else e.aggregate_id end
            from outbox.batch_events(p_batch, p_fence) as e
            where p_event_ids is null or e.event_id = any(p_event_ids)
        )
        order by p.id for update;
    end if;
    case
        when p_operation in ('create', 'confirm', 'capture', 'cancel') then
            v_planned := surety.plan_payment_calls(p_batch, p_fence, p_operation, p_event_ids);
        when p_operation = 'refund' then
            v_planned := surety.plan_refund_calls(p_batch, p_fence, p_event_ids);
        when p_operation = 'evidence' then
            v_planned := surety.plan_evidence_calls(p_batch, p_fence, p_event_ids);
    end case;
    return query
    with planned as (
        select j.*, (j.payment).id as payment_id, j.verdict not in ('skip', 'wait', 'needs_customer') as is_sent
        from unnest(v_planned) as j
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select j.payment_id, j.operation, j.idempotency_key, j.request::text, v_now, v_now
        from planned as j where j.is_sent
        order by j.payment_id, j.operation
        on conflict on constraint calls_pkey do update
        set
            sends = c.sends + 1,
            last_sent_at = excluded.last_sent_at,
            -- Until the key is replaced, the last answer still decides whether the key can be used again.
            (answered_at, status) = (
                select c.answered_at, c.status from planned as j
                where j.payment_id = c.payment_id and j.operation = c.operation and j.verdict in ('find', 'replace_key')
            )
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends, c.first_sent_at, c.last_sent_at
    ),
    stepped as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select j.payment_id, (j.payment).version + 1, 'initiated', 'submitting', 'command', v_now, p_actor
        from planned as j where j.is_sent and (j.payment).state = 'initiated'
        order by j.payment_id
    ),
    audited as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, j.payment_id, (j.payment).merchant_id,
            -- Evidence is sent again without a read before.
            case when j.verdict = 'send' or p_operation = 'evidence' then 'sent' else 'asked' end,
            jsonb_build_object('operation', j.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from planned as j
        join written as w on w.payment_id = j.payment_id and w.operation = j.operation and j.is_sent
    )
    select
        j.event_id, j.subject_id, j.payment_id, j.verdict, j.operation, w.idempotency_key, w.request::jsonb,
        (j.payment).provider_account, j.provider_id, w.first_sent_at, coalesce(j.last_sent_at, w.last_sent_at), w.sends,
        (j.payment).amount_minor, (j.payment).currency, (j.payment).livemode
    from planned as j
    left join written as w on w.payment_id = j.payment_id and w.operation = j.operation and j.is_sent
    order by j.event_id;
end;
$$;

comment on function surety.begin_calls(bigint, bigint, text, text, text[]) is
'Writes the calls of one operation (create, confirm, capture, cancel, refund, evidence) before they are sent, and moves
initiated payments to submitting. One row for each event left in the batch (of p_event_ids, if given): the verdict, and
the request and key exactly as they were first written. subject_id is the payment, refund or dispute; provider_id the
intent or dispute at the provider; last_sent_at the time of the send before this one, or of this one if it is the first;
send_number counts the sends. No rows when another worker holds the lease.';

create or replace function surety.is_surely_unexecuted(p_payment_id text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select not exists (
        select from surety.calls
        where calls.payment_id = p_payment_id and calls.operation = 'create' and calls.refused_through < calls.sends
    );
end;

comment on function surety.is_surely_unexecuted(text) is
'Whether the provider can''t hold a payment in the state initiated or submitting: no creation was sent, or each one was
refused for want of access before it was executed. False while one is under way, or if its outcome is unknown.';

create or replace function surety.replace_call_key(p_payment_id text, p_operation text) returns text
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

comment on function surety.replace_call_key(text, text) is
'Gives a call a new idempotency key and returns it. With the old key, the provider
would replay an answer without an outcome.';
