-- Calls to providers. begin_calls commits what will be sent before it is sent; record_results takes what came of it. No
-- transaction is open in between. What happens if the worker dies there: the call's row says that it was sent and not
-- answered, so the next worker sends the same bytes under the same key, or asks.

create or replace function surety.capture_asked(p_payment_id text)
returns table (amount_minor bigint, revision integer)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- The capture that is under way, if any: asked for and not refused.
    select
        facts.amount_minor,
        facts.revision
    from surety.facts
    where
        facts.payment_id = p_payment_id and facts.kind = 'capture_requested' and not exists (
            select from surety.facts as refused
            where
                refused.payment_id = facts.payment_id and refused.object_id = facts.object_id
                and refused.kind = 'capture_refused' and refused.revision = facts.revision
        )
    order by facts.revision desc
    limit 1;
end;

create or replace function surety.stripe_request(p_payment surety.payments, p_operation text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- Parameters as Stripe names them. The intent is created unconfirmed: nothing can be charged by creating it.
    select jsonb_strip_nulls(case p_operation
        when 'create' then jsonb_build_object(
            'amount', p_payment.amount_minor,
            'currency', p_payment.currency,
            'payment_method', p_payment.method_token,
            'automatic_payment_methods', jsonb_build_object('enabled', true, 'allow_redirects', 'never'),
            'allowed_payment_method_types', jsonb_build_array('card'),
            'capture_method', case p_payment.capture_method when 'manual' then 'manual' else 'automatic_async' end,
            'description', p_payment.description,
            'statement_descriptor_suffix', p_payment.statement_descriptor_suffix,
            'metadata', jsonb_build_object(
                'surety_payment', p_payment.id,
                'surety_environment', (select environment.id from surety.environment)
            )
        )
        when 'confirm' then jsonb_build_object('return_url', p_payment.return_url)
        when 'capture' then jsonb_build_object(
            'amount_to_capture', (select asked.amount_minor from surety.capture_asked(p_payment.id) as asked)
        )
        when 'cancel' then jsonb_build_object(
            'cancellation_reason',
            case when p_payment.flags ? 'cancel_requested_at' then 'requested_by_customer' else 'abandoned' end
        )
        else jsonb_build_object('cancellation_reason', 'duplicate')
    end);
end;

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
        left join lateral surety.capture_asked(p.id) as asked on p_operation in ('capture', 'cancel')
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

create or replace function surety.renew_call(p_payment_id text, p_operation text) returns text
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
comment on function surety.renew_call(text, text) is
'A fresh key for a call that was asked about and that the provider does not know of. Returns the key.';

create or replace function surety.take_turn(
    p_provider text, p_account text, p_per_second double precision, p_is_urgent boolean
) returns double precision
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- GCRA in one statement: next_at moves on by one request's share of a second and may lag by half a second's worth.
    -- Who isn't urgent takes a turn only where nobody would wait for it. A minute's backlog at most is kept, so that a
    -- clock that was set back can't stop us.
    with taken as (
        insert into surety.provider_paces as paces (provider, account, next_at)
        values (
            p_provider, p_account,
            surety.time_now() - interval '500 milliseconds' + make_interval(secs => 1 / p_per_second)
        )
        on conflict (provider, account) do update
        set next_at = greatest(
            least(paces.next_at, surety.time_now() + interval '1 minute'),
            surety.time_now() - interval '500 milliseconds'
        ) + make_interval(secs => 1 / p_per_second)
        where p_is_urgent or paces.next_at < surety.time_now() - interval '250 milliseconds'
        returning extract(epoch from paces.next_at - surety.time_now())::double precision as seconds
    )

    select greatest(0, taken.seconds) from taken;
end;
comment on function surety.take_turn(text, text, double precision, boolean) is
'Seconds to wait before one request may be sent to a provider''s account, its turn being taken; null where the turn was
left to urgent requests.';

create or replace function surety.refuse_payments(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Payments whose creation the provider refused for what they are: nothing exists there, so they have failed.
declare
    v_now timestamptz := surety.time_now();
    v_types text[] := '{}';
begin
    perform from surety.payments as p
    where p.id in (
        select r.result ->> 'payment_id' from jsonb_array_elements(p_results) as r (result) where r.result ? 'refused'
    )
    order by p.id for update;
    update surety.payments as p
    set failure = r.refused
    from jsonb_to_recordset(p_results) as r (payment_id text, refused jsonb)
    where p.id = r.payment_id and r.refused is not null and p.state = 'submitting';
    v_types := surety.refuse_captures(p_results, p_actor) || surety.refuse_refunds(p_results, p_actor);
    with refused as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
        select p.id, p.version + 1, p.state, 'failed', 'refused', v_now, p_actor
        from jsonb_to_recordset(p_results) as r (payment_id text, refused jsonb)
        join surety.payments as p on p.id = r.payment_id
        where r.refused is not null and p.state = 'submitting'
        order by p.id
        returning to_state
    )
    select v_types || coalesce(array_agg(distinct 'payment.' || s.to_state), '{}') into v_types from refused as s;
    return v_types;
end;
$$;

create or replace function surety.refuse_captures(p_results jsonb, p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Captures that the provider would not make, of payments that are locked: the hold lives, another may be asked for.
declare
    v_now timestamptz := surety.time_now();
    v_refused surety.facts [];
begin
    select array_agg((
        surety.new_id('fct', v_now), p.id, p.provider, p.provider_account, p.livemode, p.id || ':capture',
        'capture_refused', asked.revision, asked.amount_minor, p.currency, jsonb_build_object('failure', r.refused),
        'response', null, null, null, v_now
    )::surety.facts order by p.id) into v_refused
    from jsonb_to_recordset(p_results) as r (payment_id text, operation text, refused jsonb)
    join surety.payments as p on p.id = r.payment_id
    cross join lateral surety.capture_asked(p.id) as asked
    where r.refused is not null and r.operation = 'capture';
    if v_refused is null then
        return '{}';
    end if;
    insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
    select f.provider, f.account, f.livemode, f.object_id, f.kind, f.revision, f.id from unnest(v_refused) as f;
    insert into surety.facts select f.* from unnest(v_refused) as f;
    return surety.advance(
        array(select d from surety.derive(array(select f.payment_id from unnest(v_refused) as f)) as d), 'response',
        p_actor, null);
end;
$$;

create or replace function surety.record_outcomes(p_actor text, p_results jsonb) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- What came of calls: [{"payment_id"?, "operation"?, "status"?, "duration_ms"?, "outcome", "snapshot"?, "facts"?: [],
-- "refused"?: {code, decline_code, message}, "discrepancy"?: {kind, subject, detail}, "error"?}].
-- Facts and refusals each lock their payments, so one array holds either: else two of them could wait for each other.
-- Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_facts jsonb;
    v_types text[] := '{}';
    v_entries jsonb;
begin
    select jsonb_agg(f.fact) into v_facts
    from jsonb_array_elements(p_results) as r (result)
    cross join lateral jsonb_array_elements(
        case when jsonb_typeof(r.result -> 'facts') = 'array' then r.result -> 'facts' else '[]' end
    ) as f (fact);
    if v_facts is not null then
        v_types := surety.record_facts(v_facts, p_actor);
    end if;
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'refused') then
        if v_facts is not null then
            raise exception 'facts and refusals are recorded in transactions of their own' using errcode = 'SU004';
        end if;
        v_types := surety.refuse_payments(p_results, p_actor);
    end if;
    perform surety.open_discrepancy(
        r.discrepancy ->> 'kind', r.discrepancy ->> 'subject', r.payment_id, r.discrepancy ->> 'detail', '{}', true,
        v_now)
    from jsonb_to_recordset(p_results) as r (payment_id text, discrepancy jsonb)
    where r.discrepancy is not null
    order by r.discrepancy ->> 'kind', r.discrepancy ->> 'subject';

    update surety.calls as c
    set answered_at = v_now, status = r.status
    from jsonb_to_recordset(p_results) as r (payment_id text, operation text, status smallint)
    where c.payment_id = r.payment_id and c.operation = r.operation and r.status is not null;

    select jsonb_agg(jsonb_build_object(
        'kind', 'answer', 'actor', p_actor, 'payment_id', r.payment_id, 'outcome', r.outcome,
        'reason', r.error, 'duration_ms', r.duration_ms,
        'snapshot', coalesce(r.snapshot, '{}') || jsonb_build_object('operation', r.operation, 'status', r.status)))
    into v_entries
    from jsonb_to_recordset(p_results) as r (
        payment_id text, operation text, status smallint, outcome text, error text, duration_ms numeric, snapshot jsonb
    )
    where r.operation is not null and r.outcome is not null;
    if v_entries is not null then
        perform audit.record(v_entries);
    end if;
    return v_types;
end;
$$;

create or replace function surety.record_results(p_batch bigint, p_fence bigint, p_actor text, p_results jsonb)
returns table (is_held boolean, event_types text[])
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- What came of events: results as record_outcomes takes them, each with its "event_id" and perhaps "release_seconds"
-- or "outage". They are recorded whoever holds the lease; only the events' completion needs it. An event with
-- release_seconds is given back uncounted, one with error has failed (unless db/breaker.sql finds that its provider
-- has), every other is finished.
declare
    v_types text[] := surety.record_outcomes(p_actor, p_results);
    v_results jsonb := p_results;
    v_held boolean := true;
    v_failed jsonb;
    v_done text[];
    v_released record;
begin
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'outage') then
        v_results := surety.excuse_outages(p_batch, p_results);
    end if;
    select
        jsonb_agg(jsonb_build_object('event_id', r.event_id, 'error', r.error, 'outage', r.outage))
            filter (where r.error is not null and r.release_seconds is null),
        array_agg(r.event_id) filter (where r.error is null and r.release_seconds is null)
    into v_failed, v_done
    from jsonb_to_recordset(v_results) as r (event_id text, error text, outage text, release_seconds numeric);
    for v_released in
        select r.release_seconds, r.outage, array_agg(r.event_id) as ids, min(r.error) as reason
        from jsonb_to_recordset(v_results) as r (event_id text, error text, outage text, release_seconds numeric)
        where r.release_seconds is not null
        group by r.release_seconds, r.outage
    loop
        v_held := outbox.release(
            p_batch, p_fence, v_released.ids, make_interval(secs => v_released.release_seconds::double precision),
            coalesce(v_released.reason, 'given back'), v_released.outage) and v_held;
    end loop;
    if v_failed is not null then
        v_held := outbox.fail(p_batch, p_fence, v_failed) and v_held;
    end if;
    if v_done is not null then
        v_held := outbox.finish(p_batch, p_fence, v_done) and v_held;
    end if;
    return query select v_held, v_types;
end;
$$;

create or replace function surety.claim_questions(p_limit integer)
returns table (
    payment_id text, provider_id text, account text, amount_minor bigint, currency text, livemode boolean,
    first_sent_at timestamptz, last_sent_at timestamptz
)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select payments.id
        from surety.payments
        where
            payments.ask_at <= surety.time_now()
            and not exists (
                select from surety.breakers
                where
                    breakers.provider = payments.provider and breakers.account = payments.provider_account
                    and breakers.opened_at is not null
            )
        order by payments.ask_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.payments
        set
            asked = payments.asked + 1,
            ask_at = surety.time_now() + states.ask_after * least(64, 2 ^ (payments.asked + 1))
        from due, surety.states
        where payments.id = due.id and payments.state = states.state
        returning
            payments.id, payments.provider_id, payments.provider_account, payments.amount_minor, payments.currency,
            payments.livemode
    )

    select
        claimed.id,
        claimed.provider_id,
        claimed.provider_account,
        claimed.amount_minor,
        claimed.currency,
        claimed.livemode,
        calls.first_sent_at,
        calls.last_sent_at
    from claimed
    left join surety.calls on claimed.id = calls.payment_id and calls.operation = 'create'
    -- Nothing was sent for it, so there is nothing to ask.
    where claimed.provider_id is not null or calls.payment_id is not null;
end;
comment on function surety.claim_questions(integer) is
'Unfinished payments that the sweep should ask their provider about now; each is asked again at growing intervals, up to
64 times the state''s ask_after, for as long as it is unfinished. One without provider_id was sent between first_sent_at
and last_sent_at, and nobody knows whether it came there.';
