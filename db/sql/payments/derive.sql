-- Deriving: a payment's state and amounts as a function of its facts.
--
--   counted_facts     the facts that count: not disregarded; of intents, those of the payment's own
--   derive_payments   reduces them in steps, each a common table expression:
--     winners         per object (charge, refund, dispute, return, command) the fact that stands
--     outcomes        per payment the sums of what stands: captured, refunded, at risk, reversed
--     transactions    per balance transaction its gross amount and whether it is available
--     money           per payment the money that arrived
--     known           per payment what its facts prove about the intent
--     amounts         all of it in one row, with requested refunds that no fact mentions yet
--   state_of_amounts  the state that follows from the amounts

create or replace function surety.counted_facts(p_payment_ids text[])
returns table (
    id text, payment_id text, object_id text, kind text, revision integer, amount_minor bigint, data jsonb,
    family text, rank smallint, evidences text
)
language sql stable
begin atomic
    -- No set clause, so that PostgreSQL can inline the function. offset 0 keeps facts and payments as index look-ups,
    -- however many rows the planner estimates.
    with subjects as (
        select
            asked.payment_id,
            coalesce(payments.provider_id, (
                select first_known.object_id
                from surety.facts as first_known
                where
                    first_known.payment_id = asked.payment_id and first_known.disregarded is null
                    and first_known.kind in (
                        select kinds.kind from surety.fact_kinds as kinds
                        where kinds.family = 'intent'
                    )
                order by first_known.id
                limit 1
            )) as intent
        from unnest(p_payment_ids) as asked (payment_id)
        cross join lateral (
            select one.provider_id
            from surety.payments as one
            where asked.payment_id = one.id
            offset 0
        ) as payments
    )

    select
        facts.id,
        facts.payment_id,
        facts.object_id,
        facts.kind,
        facts.revision,
        facts.amount_minor,
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
            known.data
        from surety.facts as known
        where asked.payment_id = known.payment_id and known.disregarded is null
        offset 0
    ) as facts
    inner join surety.fact_kinds on facts.kind = fact_kinds.kind
    where
        fact_kinds.family not in ('warning', 'card')
        and (fact_kinds.family <> 'intent' or facts.object_id = asked.intent);
end;

comment on function surety.counted_facts(text[]) is
'The facts that count for payments, with their kind''s family, rank and proven state. A payment has one intent: the one
it holds, else the first that a fact names. Facts of another intent don''t count; charges do, whatever their intent.
Warnings and cards change neither state nor amounts.';

create or replace function surety.state_of_amounts(
    p_capture_method text, p_captured_minor bigint, p_refunded_minor bigint, p_at_risk_minor bigint,
    p_reversed_minor bigint, p_is_settled boolean, p_has_failed boolean, p_is_canceled boolean,
    p_is_processing boolean, p_is_authorized boolean, p_needs_action boolean
) returns text
language sql immutable parallel safe
begin atomic
    -- The first condition that holds decides.
    select case
        when p_captured_minor > 0 and p_at_risk_minor > 0 then 'disputed'
        -- A part that was lost is not paid, however small; the amounts say how much it is.
        when p_captured_minor > 0 and p_reversed_minor > 0 then 'reversed'
        when p_captured_minor > 0 and p_refunded_minor >= p_captured_minor then 'refunded'
        when p_captured_minor > 0 and p_refunded_minor > 0 then 'partially_refunded'
        when p_captured_minor > 0 and p_is_settled then 'settled'
        when p_captured_minor > 0 then 'confirmed'
        when p_has_failed then 'failed'
        when p_is_canceled then 'canceled'
        when p_is_processing then 'processing'
        when p_is_authorized and p_capture_method = 'manual' then 'authorized'
        when p_needs_action then 'requires_action'
        else 'provider_submitted'
    end;
end;

comment on function surety.state_of_amounts(
    text, bigint, bigint, bigint, bigint, boolean, boolean, boolean, boolean, boolean, boolean
) is
'The state of a payment with these amounts in minor units and these proofs about its intent. Money that was captured
decides before anything else.';

create or replace function surety.derive_payments(p_payment_ids text[])
returns setof surety.derived
language sql stable security definer set search_path = pg_catalog, pg_temp
-- Callers disable hash joins for their look-ups; this function enables them to join the parts of a batch.
set enable_hashjoin = on
begin atomic
    with counted as (
        select counted_facts.* from surety.counted_facts(p_payment_ids)
    ),

    -- Per object the last revision decides (disputes have several), then the highest rank.
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
            -- A bank's credit is available at once.
            bool_or(counted.kind = 'available' or counted.data ->> 'category' = 'ach_credit') as is_available,
            -- In the payment's currency: other_gross where the record is in another one.
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
            -- A canceled intent may not name the error of its attempt any more.
            bool_or(counted.kind = 'failed')
            or (bool_or(counted.kind = 'canceled') and bool_or(counted.kind = 'attempt_failed')) as failed,
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
            -- An ACH entry that was returned before it was captured has failed.
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
            coalesce(outcomes.captured, 0) as captured_in_all,
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
        -- A refund that has no object at the provider yet counts as pending.
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
        surety.state_of_amounts(
            p_capture_method => amounts.capture_method, p_captured_minor => amounts.captured,
            p_refunded_minor => amounts.refunded, p_at_risk_minor => amounts.at_risk,
            p_reversed_minor => amounts.reversed, p_is_settled => amounts.settled, p_has_failed => amounts.failed,
            p_is_canceled => amounts.canceled, p_is_processing => amounts.processing,
            p_is_authorized => amounts.authorized, p_needs_action => amounts.action
        ),
        amounts.captured,
        amounts.captured_in_all - amounts.captured,
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
        -- An intent that is canceled after a refused confirmation keeps no error of its own.
        case when amounts.captured = 0 and (amounts.failed or amounts.canceled) then amounts.failure end
    from amounts;
end;

comment on function surety.derive_payments(text[]) is
'The state and amounts, in minor units, that payments should have. They depend only on surety.facts and on requested
refunds that no fact mentions yet, not on the order of facts or the present state. A payment without counted facts has
no row.';
