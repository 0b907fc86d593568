-- derive: a payment's state and amounts as a function of its facts.

create or replace function surety.derive_payments(p_payment_ids text[])
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

comment on function surety.derive_payments(text[]) is
'What each payment''s facts say: its state and amounts in minor units. A pure function of surety.facts, and of the
refunds that were asked for and that no fact tells of yet: neither their order nor the present state matters.';
