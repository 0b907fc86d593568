-- Invariants of the ledger: its sums, and what causes a posting.

create or replace view invariant.debits_equal_credits as
select sums.currency as subject
from (
    select
        legs.currency,
        sum(legs.amount_minor) as total
    from (
        select
            accounts.currency,
            transfers.amount_minor
        from ledger.transfers
        inner join ledger.accounts on transfers.credit_account = accounts.id
        union all
        select
            accounts.currency,
            -transfers.amount_minor
        from ledger.transfers
        inner join ledger.accounts on transfers.debit_account = accounts.id
    ) as legs
    group by legs.currency
) as sums
where sums.total <> 0;

comment on view invariant.debits_equal_credits is 'debits equal credits, per currency';

create or replace view invariant.balances_are_sums_of_transfers as
select accounts.id as subject
from ledger.accounts
inner join ledger.account_kinds on accounts.kind = account_kinds.kind
left join ledger.balances on accounts.id = balances.account_id
left join (
    select
        legs.account_id,
        sum(legs.amount_minor) as total
    from (
        select
            transfers.credit_account as account_id,
            transfers.amount_minor
        from ledger.transfers
        union all
        select
            transfers.debit_account,
            -transfers.amount_minor
        from ledger.transfers
    ) as legs
    group by legs.account_id
) as sums on accounts.id = sums.account_id
where account_kinds.keeps_balance and coalesce(balances.balance_minor, 0) <> coalesce(sums.total, 0);

comment on view invariant.balances_are_sums_of_transfers is 'every balance is the sum of its transfers';

create or replace view invariant.postings_follow_rules as
select postings.cause as subject
from ledger.postings
left join ledger.transfers on postings.id = transfers.posting_id
where not exists (
    select from ledger.rules
    where
        rules.rule = postings.rule
        and (
            transfers.leg is null
            or rules.leg = transfers.leg
            and array[split_part(transfers.debit_account, ':', 1), split_part(transfers.credit_account, ':', 1)]
            in (array[rules.debit, rules.credit], array[rules.credit, rules.debit])
        )
);

comment on view invariant.postings_follow_rules is 'every cause posted what its rule says';

create or replace view invariant.captures_are_owed_to_merchants as
select payments.id as subject
from surety.payments
where payments.captured_minor > 0 and not exists (
    select from ledger.postings
    where postings.payment_id = payments.id and postings.rule in ('captured', 'captured_ach')
);

comment on view invariant.captures_are_owed_to_merchants is 'every capture is owed to the merchant';

create or replace view invariant.settlements_are_available as
select steps.payment_id as subject
from surety.steps
where steps.to_state = 'settled' and not exists (
    select from ledger.postings where postings.cause = steps.payment_id || ':settled'
);

comment on view invariant.settlements_are_available is 'every settlement is available to the merchant';

create or replace view invariant.returns_are_taken_from_merchants as
select facts.object_id as subject
from surety.facts
inner join surety.payments on facts.payment_id = payments.id
where
    facts.kind in ('returned', 'dishonored', 'contested') and facts.disregarded is null
    and payments.captured_minor > 0
    and not exists (
        select from ledger.postings where postings.cause = facts.object_id || ':' || facts.kind
    );

comment on view invariant.returns_are_taken_from_merchants is 'every return is taken from the merchant';

create or replace view invariant.daily_balances_are_sums_of_transfers as
with moved as (
    select
        legs.account_id,
        (postings.at at time zone 'UTC')::date as day,
        sum(legs.amount_minor) as amount_minor
    from (
        select
            transfers.posting_id,
            transfers.credit_account as account_id,
            transfers.amount_minor
        from ledger.transfers
        union all
        select
            transfers.posting_id,
            transfers.debit_account,
            -transfers.amount_minor
        from ledger.transfers
    ) as legs
    inner join ledger.postings on legs.posting_id = postings.id
    where postings.at < (select final_postings.summed_to from ledger.final_postings)
    group by 1, 2
),

summed as (
    select
        moved.account_id,
        moved.day,
        sum(moved.amount_minor) over (partition by moved.account_id order by moved.day) as balance_minor
    from moved
)

select coalesce(daily_balances.account_id, summed.account_id) as subject
from ledger.daily_balances
full join summed on daily_balances.account_id = summed.account_id and daily_balances.day = summed.day
where daily_balances.balance_minor is distinct from summed.balance_minor;

comment on view invariant.daily_balances_are_sums_of_transfers is
'every balance of a day is the sum of the transfers until its end';

create or replace view invariant.closed_balances_stay as
select coalesce(closed_balances.account_id, kept.account_id) as subject
from ledger.closed_balances
full join (
    select
        closed_months.month,
        balances.account_id,
        balances.balance_minor
    from ledger.closed_months
    cross join lateral ledger.balances_at(ledger.month_end(closed_months.month)) as balances
) as kept
    on closed_balances.month = kept.month and closed_balances.account_id = kept.account_id
where closed_balances.balance_minor is distinct from kept.balance_minor;

comment on view invariant.closed_balances_stay is
'the balances of a closed month stay as they were';

create or replace view invariant.merchant_payouts_are_reserved as
select coalesce(balances.account_id, asked.account_id) as subject
from (
    select
        balances.account_id,
        balances.balance_minor
    from ledger.balances
    where balances.account_id like 'reserved\_for\_payouts:%'
) as balances
full join (
    select
        'reserved_for_payouts:' || merchant_payouts.merchant_id || ':' || merchant_payouts.currency as account_id,
        sum(merchant_payouts.amount_minor) as total
    from surety.merchant_payouts
    where merchant_payouts.state = 'asked'
    group by 1
) as asked on balances.account_id = asked.account_id
where coalesce(balances.balance_minor, 0) <> coalesce(asked.total, 0);

comment on view invariant.merchant_payouts_are_reserved is
'every amount reserved for payouts is the sum of the payouts to be sent';

create or replace view invariant.merchant_payouts_post_their_states as
select merchant_payouts.id as subject
from surety.merchant_payouts
cross join lateral unnest(case merchant_payouts.state
    when 'asked' then array['asked']
    when 'left' then array['asked', 'left']
    when 'returned' then array['asked', 'left', 'returned']
    when 'canceled' then array['asked', 'canceled']
end) as passed (state)
where not exists (
    select from ledger.postings where postings.cause = merchant_payouts.id || ':' || passed.state
);

comment on view invariant.merchant_payouts_post_their_states is
'every payout to a merchant has posted each of its states';
