-- Invariants of refunds: their states, and the amounts that they reserve and give back.

create or replace view invariant.refunds_match_last_step as
select refunds.id as subject
from surety.refunds
left join lateral (
    select
        refund_steps.version,
        refund_steps.to_state
    from surety.refund_steps
    where refund_steps.refund_id = refunds.id
    order by refund_steps.version desc
    limit 1
) as last on true
where (refunds.version, refunds.state) is distinct from (last.version, last.to_state);

comment on view invariant.refunds_match_last_step is 'every refund is in the state of its last step';

create or replace view invariant.refund_steps_are_connected as
select refund_steps.refund_id as subject
from surety.refund_steps
left join surety.refund_steps as before
    on refund_steps.refund_id = before.refund_id and refund_steps.prior_version = before.version
where refund_steps.version > 1 and refund_steps.from_state is distinct from before.to_state;

comment on view invariant.refund_steps_are_connected is 'every refund step starts where the last ended';

create or replace view invariant.refunded_amounts_match_refunds as
select payments.id as subject
from surety.payments
left join (
    select
        refunds.payment_id,
        sum(refunds.amount_minor) filter (where refunds.state = 'succeeded') as succeeded,
        sum(refunds.amount_minor) filter (where refunds.state in ('pending', 'requires_action')) as pending
    from surety.refunds
    group by refunds.payment_id
) as given on payments.id = given.payment_id
where
    payments.refunded_minor <> least(coalesce(given.succeeded, 0), payments.captured_minor)
    or payments.refund_pending_minor
    <> least(coalesce(given.pending, 0), payments.captured_minor - payments.refunded_minor);

comment on view invariant.refunded_amounts_match_refunds is 'every refunded amount is the sum of its refunds';

create or replace view invariant.reserved_balances_match_refunds as
select sums.account_id as subject
from (
    select
        parts.account_id,
        sum(parts.amount_minor) as amount_minor
    from (
        select
            'reserved_for_refunds:' || refunds.merchant_id || ':' || refunds.currency as account_id,
            refunds.amount_minor
        from surety.refunds
        inner join surety.refund_states on refunds.state = refund_states.state
        where refund_states.is_live
        union all
        select
            'reserved_for_refunds:' || payments.merchant_id || ':'
            || coalesce(facts.data ->> 'other_currency', facts.currency),
            coalesce((facts.data ->> 'other_gross')::bigint, facts.amount_minor)
        from surety.facts
        inner join surety.payments on facts.payment_id = payments.id
        where
            facts.kind = 'money' and facts.disregarded is null
            and facts.data ->> 'category' in ('refund', 'refund_failure')
        union all
        select
            balances.account_id,
            -balances.balance_minor
        from ledger.balances
        where balances.account_id like 'reserved\_for\_refunds:%'
    ) as parts
    group by parts.account_id
) as sums
where sums.amount_minor <> 0;

comment on view invariant.reserved_balances_match_refunds is 'every reserved balance is the sum of its live refunds';

create or replace view invariant.refunds_match_balance_transactions as
select refunds.id as subject
from surety.refunds
left join lateral (
    select
        coalesce(sum(coalesce((facts.data ->> 'other_gross')::bigint, facts.amount_minor)), 0) as amount_minor,
        max(facts.recorded_at) as recorded_at
    from surety.facts
    where
        facts.payment_id = refunds.payment_id and facts.kind = 'money' and facts.disregarded is null
        and facts.data ->> 'source' = refunds.provider_id
        and facts.data ->> 'category' in ('refund', 'refund_failure')
) as moved on true
where
    refunds.state in ('succeeded', 'failed', 'canceled')
    -- The state and the money are read separately, so one may come later.
    and greatest(refunds.updated_at, moved.recorded_at) < surety.read_clock() - interval '7 days'
    and moved.amount_minor <> case refunds.state when 'succeeded' then -refunds.amount_minor else 0 end;

comment on view invariant.refunds_match_balance_transactions is
'every refund that has ended has moved the money of its state';
