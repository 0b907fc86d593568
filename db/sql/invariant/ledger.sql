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
