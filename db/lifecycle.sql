-- Steps: inserting them is the only way to change a payment's state. The trigger below projects them and tells the
-- outbox and the audit trail, once per statement, for all payments of a batch.

create or replace function surety.project_steps() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_now timestamptz := surety.time_now();
    v_epoch integer := outbox.epoch();
    v_is_later boolean := exists (select from new_steps as n where n.version > 1);
begin
    -- Who inserts a payment or changes its amounts has written the projection along; here it is made for the others.
    if v_is_later then
        update surety.payments as p
        set version = last.version, state = last.to_state, updated_at = last.at,
            ask_at = last.at + s.ask_after, asked = 0,
            next_action = case when last.to_state = 'requires_action' then p.next_action end
        from (
            select distinct on (n.payment_id) n.payment_id, n.version, n.to_state, n.at
            from new_steps as n
            order by n.payment_id, n.version desc
        ) as last
        join surety.states as s on s.state = last.to_state
        where p.id = last.payment_id and p.version < last.version;
    end if;

    with told as materialized (
        select
            n.payment_id, n.version, n.from_state, n.to_state, n.cause, n.implied, n.at, n.actor, n.request_id,
            p.merchant_id, p.captured_minor, p.refunded_minor, p.provider_id, p.failure, p.next_action
        from new_steps as n
        join surety.payments as p on p.id = n.payment_id
        order by n.payment_id, n.version
    ),
    emitted as (
        insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, merchant_id, version, epoch)
        select
            surety.new_id('evt', v_now), 'payment', t.payment_id, 'payment.' || t.to_state,
            jsonb_strip_nulls(jsonb_build_object(
                'payment_id', t.payment_id, 'state', t.to_state, 'version', t.version, 'at', surety.iso(t.at),
                'amount_captured', nullif(t.captured_minor, 0), 'amount_refunded', nullif(t.refunded_minor, 0),
                'provider_id', t.provider_id, 'failure', t.failure,
                'next_action', case when t.to_state = 'requires_action' then t.next_action end)),
            t.merchant_id, t.version, v_epoch
        from told as t
    )
    insert into audit.entries (
        id, at, kind, actor, request_id, payment_id, merchant_id, version, from_state, to_state, outcome, reason,
        snapshot
    )
    select
        surety.new_id('aud', v_now), t.at, 'step', t.actor, t.request_id, t.payment_id, t.merchant_id, t.version,
        t.from_state, t.to_state, case when t.implied then 'implied' else 'done' end, t.cause, '{}'
    from told as t
    -- The request that makes a payment tells its first step itself, with what only it knows.
    where t.version > 1 or t.cause <> 'request';

    if not v_is_later then
        return null;
    end if;

    -- A reference is free again once its payment has failed or was canceled, and taken back if it succeeds after all.
    if exists (select from new_steps as n where n.to_state in ('failed', 'canceled')) then
        delete from surety.payment_references as r
        using new_steps as n join surety.payments as p on p.id = n.payment_id
        where n.to_state in ('failed', 'canceled') and r.payment_id = n.payment_id
            and r.merchant_id = p.merchant_id and r.reference = p.reference;
    end if;
    if exists (select from new_steps as n where n.from_state in ('failed', 'canceled')) then
        with again as (
            select p.merchant_id, p.reference, p.id
            from new_steps as n join surety.payments as p on p.id = n.payment_id
            where n.from_state in ('failed', 'canceled') and p.reference is not null
        ),
        taken as (
            insert into surety.payment_references (merchant_id, reference, payment_id)
            select a.merchant_id, a.reference, a.id from again as a
            order by a.merchant_id, a.reference
            on conflict (merchant_id, reference) do nothing
            returning payment_id
        )
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', v_now), 'duplicate', a.id, a.id,
            'it succeeded after it had ended, and its reference belongs to another payment by now', v_now
        from again as a where a.id not in (select t.payment_id from taken as t)
        on conflict (kind, subject) do nothing;
    end if;

    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'resolved', closed_by = 'system',
        closed_because = 'the payment is ' || n.to_state
    from new_steps as n join surety.states as s on s.state = n.to_state
    where d.payment_id = n.payment_id and d.type like 'payment.%' and d.closed_at is null and s.is_final;
    return null;
end;
$$;

create or replace trigger steps_are_projected after insert on surety.steps
referencing new table as new_steps for each statement execute function surety.project_steps();

create or replace function surety.derive(p_payment_ids text[])
returns setof surety.derived
language sql stable security definer set search_path = pg_catalog, pg_temp
-- Callers switch hash joins off for their own look-ups; here a batch's parts meet by them.
set enable_hashjoin = on
begin atomic
    -- offset 0 keeps the look-ups of facts and payments what they are, whatever the planner believes of their number.
    with subjects as (
        -- A payment has one intent, the first that was told of. What becomes of another says nothing about the payment,
        -- unless it charges; and its charges count, whosever they are.
        select
            asked.payment_id,
            coalesce(payments.provider_id, (
                select first_told.object_id
                from surety.facts as first_told
                where
                    first_told.payment_id = asked.payment_id and first_told.disregarded is null
                    and first_told.kind in (
                        select kinds.kind from surety.fact_kinds as kinds
                        where kinds.family = 'intent'
                    )
                order by first_told.id
                limit 1
            )) as intent
        from unnest(p_payment_ids) as asked (payment_id)
        cross join lateral (
            select one.provider_id
            from surety.payments as one
            where asked.payment_id = one.id
            offset 0
        ) as payments
    ),

    counted as (
        select
            facts.id,
            facts.payment_id,
            facts.object_id,
            facts.kind,
            facts.revision,
            facts.amount_minor,
            facts.currency,
            facts.data,
            fact_kinds.family,
            fact_kinds.rank,
            fact_kinds.evidences
        from subjects as asked
        cross join lateral (
            select
                known.id,
                known.payment_id,
                known.object_id,
                known.kind,
                known.revision,
                known.amount_minor,
                known.currency,
                known.data
            from surety.facts as known
            where asked.payment_id = known.payment_id and known.disregarded is null
            offset 0
        ) as facts
        inner join surety.fact_kinds on facts.kind = fact_kinds.kind
        where fact_kinds.family <> 'intent' or facts.object_id = asked.intent
    ),

    -- Per object the highest rank wins; where a kind is not monotone, the last revision.
    winners as (
        select distinct on (counted.payment_id, counted.family, counted.object_id)
            counted.payment_id,
            counted.kind,
            counted.amount_minor
        from counted
        where counted.family in ('refund', 'dispute', 'return', 'charge', 'command')
        order by
            counted.payment_id asc, counted.family asc, counted.object_id asc, counted.revision desc, counted.rank desc
    ),

    outcomes as (
        select
            winners.payment_id,
            coalesce(sum(winners.amount_minor) filter (where winners.kind = 'captured'), 0)::bigint as captured,
            coalesce(sum(winners.amount_minor) filter (where winners.kind = 'refund_succeeded'), 0)::bigint as refunded,
            coalesce(
                sum(winners.amount_minor) filter (where winners.kind in ('refund_pending', 'refund_action')), 0
            )::bigint as refunding,
            coalesce(sum(winners.amount_minor) filter (where winners.kind = 'dispute_opened'), 0)::bigint as at_risk,
            coalesce(
                sum(winners.amount_minor) filter (where winners.kind in ('dispute_lost', 'returned', 'contested')), 0
            )::bigint as reversed,
            coalesce(bool_or(winners.kind in ('returned', 'contested')), false) as returned,
            coalesce(bool_or(winners.kind = 'dispute_lost'), false) as lost,
            coalesce(bool_or(winners.kind = 'capture_requested'), false) as capturing
        from winners
        group by winners.payment_id
    ),

    transactions as (
        select
            counted.payment_id,
            counted.object_id,
            -- What a bank has credited is there.
            bool_or(counted.kind = 'available' or counted.data ->> 'category' = 'ach_credit') as is_available,
            -- In the payment's currency: other_gross where the record is in another.
            max(coalesce((counted.data ->> 'other_gross')::bigint, counted.amount_minor)) filter (
                where counted.kind = 'money'
                and counted.data ->> 'category' in ('charge', 'partial_capture_reversal', 'ach_credit')
            ) as gross
        from counted
        where counted.family = 'money'
        group by counted.payment_id, counted.object_id
    ),

    money as (
        select
            transactions.payment_id,
            sum(transactions.gross) as gross,
            bool_and(transactions.is_available) as is_available
        from transactions
        where transactions.gross is not null
        group by transactions.payment_id
    ),

    known as (
        select
            counted.payment_id,
            bool_or(counted.kind = 'failed') as failed,
            bool_or(counted.kind = 'canceled') as canceled,
            bool_or(counted.kind = 'processing' or counted.family = 'return') as processing,
            bool_or(counted.kind = 'authorized') as authorized,
            bool_or(counted.kind = 'action') as action,
            array_agg(distinct counted.evidences) filter (where counted.evidences is not null) as evidenced,
            max(counted.object_id) filter (where counted.family = 'intent') as provider_id,
            (array_agg(counted.data -> 'next_action') filter (where counted.kind = 'action'))[1] as next_action,
            (array_agg(counted.data -> 'failure' order by counted.rank desc) filter (
                where counted.kind in ('failed', 'attempt_failed', 'returned', 'contested')
                and counted.data ? 'failure'
            ))[1] as failure
        from counted
        group by counted.payment_id
    ),

    amounts as (
        select
            known.payment_id,
            payments.capture_method,
            -- What came back before it was captured has failed.
            known.failed or coalesce(outcomes.returned, false) as failed,
            known.canceled,
            known.processing or coalesce(outcomes.capturing, false) as processing,
            known.authorized,
            known.action,
            known.evidenced,
            known.provider_id,
            known.next_action,
            known.failure,
            coalesce(outcomes.lost, false) as lost,
            least(coalesce(outcomes.captured, 0), payments.amount_minor) as captured,
            coalesce(outcomes.captured, 0) as captured_really,
            coalesce(outcomes.refunded, 0) as refunded,
            coalesce(outcomes.refunding, 0) + reserved.minor as refunding,
            coalesce(outcomes.at_risk, 0) as at_risk,
            coalesce(outcomes.reversed, 0) as reversed,
            coalesce(money.is_available and money.gross = outcomes.captured, false) as settled
        from known
        cross join lateral (
            select
                one.amount_minor,
                one.capture_method
            from surety.payments as one
            where known.payment_id = one.id
            offset 0
        ) as payments
        -- What was asked for and has no object at the provider yet is on its way, too.
        cross join lateral (
            select coalesce(sum(refunds.amount_minor), 0)::bigint as minor
            from surety.refunds
            where refunds.payment_id = known.payment_id and refunds.provider_id is null and refunds.state = 'pending'
        ) as reserved
        left join outcomes on known.payment_id = outcomes.payment_id
        left join money on known.payment_id = money.payment_id
    )

    select
        amounts.payment_id,
        case
            when amounts.captured > 0 and amounts.at_risk > 0 then 'disputed'
            when
                amounts.captured > 0 and amounts.reversed > 0
                and amounts.reversed + amounts.refunded >= amounts.captured then 'reversed'
            when amounts.captured > 0 and amounts.refunded >= amounts.captured then 'refunded'
            when amounts.captured > 0 and amounts.refunded > 0 then 'partially_refunded'
            when amounts.captured > 0 and amounts.settled then 'settled'
            when amounts.captured > 0 then 'confirmed'
            when amounts.failed then 'failed'
            when amounts.canceled then 'canceled'
            when amounts.processing then 'processing'
            when amounts.authorized and amounts.capture_method = 'manual' then 'authorized'
            when amounts.action then 'requires_action'
            else 'provider_submitted'
        end,
        amounts.captured,
        amounts.captured_really - amounts.captured,
        least(amounts.refunded, amounts.captured),
        greatest(0, least(amounts.refunding, amounts.captured - amounts.refunded)),
        case when amounts.captured > 0 then greatest(0, amounts.refunded - amounts.captured) else 0 end,
        case when amounts.captured > 0 then amounts.at_risk else 0 end,
        case when amounts.captured > 0 then amounts.reversed else 0 end,
        amounts.settled,
        amounts.lost,
        amounts.evidenced,
        amounts.provider_id,
        amounts.next_action,
        case when amounts.captured = 0 and amounts.failed then amounts.failure end
    from amounts;
end;
comment on function surety.derive(text[]) is
'What each payment''s facts say: its state and amounts in minor units. A pure function of surety.facts, and of the
refunds that were asked for and that no fact tells of yet: neither their order nor the present state matters.';

create or replace function surety.advance(p_derived surety.derived[], p_cause text, p_actor text, p_request_id text)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Brings amounts and state of payments, already locked, to what their facts say: by way of the mandatory steps not yet
-- made, then by one direct step. Returns the types of the events made.
declare
    v_now timestamptz := surety.time_now();
    v_types text [];
begin
    with targets as materialized (
        select
            d.*, p.id, p.version, p.state, p.rail, p.capture_method,
            d.captured_minor > 0 as is_captured,
            p.state in ('failed', 'canceled') as has_ended,
            d.refunded_minor <> p.refunded_minor as is_refunded_otherwise,
            array(select s.to_state from surety.steps as s where s.payment_id = p.id) as visited,
            array[p.captured_minor, p.refunded_minor, p.refund_pending_minor, p.at_risk_minor, p.reversed_minor]
            = array[d.captured_minor, d.refunded_minor, d.refund_pending_minor, d.at_risk_minor, d.reversed_minor]
            and p.provider_id is not distinct from d.provider_id
            and (p.next_action is not distinct from d.next_action or d.target_state <> 'requires_action')
            and p.failure is not distinct from d.failure as is_same,
            p.provider_id is distinct from d.provider_id as is_another
        from unnest(p_derived) as d join surety.payments as p on p.id = d.payment_id
    ),
    path as materialized (
        select
            t.id, t.version, t.state as from_first, t.evidenced, t.is_settled, t.target_state,
            way.position, way.state, row_number() over w as n, lag(way.state, 1, t.state) over w as from_state,
            t.is_same, t.captured_minor, t.refunded_minor, t.refund_pending_minor, t.at_risk_minor, t.reversed_minor,
            t.provider_id, t.next_action, t.failure
        from targets as t
        left join lateral (
            -- What the mandatory path demands up to the target and was never visited …
            select m.position, m.state
            from surety.mandatory_steps as m
            where m.rail = t.rail and m.capture_method = t.capture_method and m.state <> all(t.visited)
                and case
                    -- What ended once and succeeded after all goes on from confirmed, whatever it had left out before.
                    when t.is_captured and t.visited && array['failed', 'canceled']
                        then m.position = 5 or (m.position = 6 and t.is_settled)
                    when t.is_captured then m.position <= 5 or t.is_settled
                    else not t.has_ended and (
                        m.position <= 3 or m.state = t.target_state
                        -- … or, on the way to its end, is known to have been …
                        or m.position = 4 and m.state = any(t.evidenced) and t.target_state <> t.state
                    )
                end
            union all
            -- … a lost dispute was a dispute …
            select 90, 'disputed'
            where t.target_state = 'reversed' and t.is_lost and t.state not in ('disputed', 'reversed')
            union all
            -- … and the target itself, unless it is where we stand or one of the above.
            select 99, t.target_state
            where (t.is_captured or not t.has_ended)
                and (
                    t.target_state <> t.state
                    or t.target_state = 'partially_refunded' and t.is_refunded_otherwise
                    or t.is_settled and t.target_state <> 'settled' and 'settled' <> all(t.visited)
                )
                and not exists (
                    select from surety.mandatory_steps as m
                    where m.rail = t.rail and m.capture_method = t.capture_method and m.state = t.target_state
                        and m.state <> all(t.visited)
                )
        ) as way on true
        window w as (partition by t.id order by way.position)
    ),
    walked as (
        insert into surety.steps (payment_id, version, from_state, to_state, cause, implied, at, actor, request_id)
        select
            path.id, path.version + path.n::integer, path.from_state, path.state, p_cause,
            path.state <> path.target_state and path.state <> all(coalesce(path.evidenced, '{}'))
            and not (path.state = 'settled' and path.is_settled),
            v_now, p_actor, p_request_id
        from path where path.state is not null
        order by path.id, path.position
        returning to_state
    ),
    -- State and amounts in one update: the steps' trigger finds the projection already made.
    changed as (
        update surety.payments as p
        set version = t.version + case when t.state is null then 0 else t.n::integer end,
            state = coalesce(t.state, p.state),
            captured_minor = t.captured_minor, refunded_minor = t.refunded_minor,
            refund_pending_minor = t.refund_pending_minor, at_risk_minor = t.at_risk_minor,
            reversed_minor = t.reversed_minor, provider_id = coalesce(t.provider_id, p.provider_id),
            next_action = case when coalesce(t.state, p.state) = 'requires_action' then t.next_action end,
            -- Why the provider refused it is no fact, and stays true of what has failed.
            failure = case
                when p.state = 'failed' and t.captured_minor = 0 then coalesce(t.failure, p.failure) else t.failure
            end,
            updated_at = v_now,
            ask_at = case when t.state is null then p.ask_at else v_now + s.ask_after end,
            asked = case when t.state is null then p.asked else 0 end
        from (select distinct on (path.id) path.* from path order by path.id, path.position desc) as t
        left join surety.states as s on s.state = t.state
        where p.id = t.id and (not t.is_same or t.state is not null)
    ),
    orphans as (
        -- We ended it, and the provider holds something live or ended it otherwise: never a step, always somebody's
        -- business.
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, opened_at)
        select
            surety.new_id('dis', v_now), 'state', t.id, t.id,
            format('%s here, %s at the provider', t.state, t.target_state), v_now
        from targets as t
        where t.has_ended and not t.is_captured and t.target_state not in (t.state, 'provider_submitted')
        on conflict (kind, subject) do nothing
        returning payment_id, detail
    ),
    called_off as (
        select outbox.emit(
            'payment', t.id, 'payment.authorized_late', jsonb_build_object('payment_id', t.id, 'reason', 'ended'),
            null, t.version) as event_id
        from targets as t
        where t.has_ended and not t.is_captured
            and t.target_state in ('provider_submitted', 'requires_action', 'authorized', 'processing')
            and (t.is_another or t.id in (select o.payment_id from orphans as o))
    ),
    excesses as (
        insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
        select
            surety.new_id('dis', v_now), 'amount', d.payment_id, d.payment_id,
            case
                when d.excess_minor > 0 then format('%s more was captured than was asked for', d.excess_minor)
                when d.over_refunded_minor > 0
                    then format('%s more was refunded than was captured', d.over_refunded_minor)
                else format(
                    '%s was refunded and %s disputed or returned, of %s',
                    d.refunded_minor, d.at_risk_minor + d.reversed_minor, d.captured_minor)
            end,
            '{}', true, v_now
        from unnest(p_derived) as d
        where d.excess_minor > 0 or d.over_refunded_minor > 0
            or d.refunded_minor + d.at_risk_minor + d.reversed_minor > d.captured_minor
        on conflict (kind, subject) do nothing
    )
    select array_agg(distinct made.type) into v_types
    from (
        select 'payment.' || w.to_state as type from walked as w
        union all
        select 'payment.authorized_late' from called_off
    ) as made;
    return coalesce(v_types, '{}');
end;
$$;
