-- Invariants of money limits and holds.

create or replace view invariant.accepted_money_matches_payments as
select accepted_money.merchant_id as subject
from surety.accepted_money
cross join lateral surety.count_accepted_money(
    accepted_money.merchant_id, accepted_money.currency, accepted_money.day
) as counted
where (accepted_money.payments, accepted_money.amount_minor) <> (counted.payments, counted.amount_minor);

comment on view invariant.accepted_money_matches_payments is
'the counters of money limits are what was accepted';

create or replace view invariant.held_payments_are_not_sent as
select payment_holds.payment_id as subject
from surety.payment_holds
left join surety.payments on payment_holds.payment_id = payments.id
where
    (payment_holds.closed_at is null and payments.state is distinct from 'initiated')
    or (
        payment_holds.outcome is distinct from 'released'
        and exists (select from surety.calls where calls.payment_id = payment_holds.payment_id
            and calls.operation in ('create', 'confirm'))
    );

comment on view invariant.held_payments_are_not_sent is
'no payment on hold was sent to the provider';

create or replace view invariant.holds_match_payments as
select coalesce(payment_holds.payment_id, payments.id) as subject
from surety.payment_holds
full join (
    select
        payments.id,
        payments.flags
    from surety.payments
    where payments.flags ? 'hold'
) as payments
    on payment_holds.payment_id = payments.id
where
    payments.flags -> 'hold' is distinct from surety.show_hold(
        coalesce(payment_holds.outcome, 'open'), payment_holds.opened_at, payment_holds.expires_at,
        payment_holds.closed_at
    );

comment on view invariant.holds_match_payments is 'merchants see every hold as it is';
