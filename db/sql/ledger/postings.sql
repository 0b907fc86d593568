-- The ledger. post() writes what ledger.rules say for each cause, once; a trigger keeps merchants' balances.

create or replace function ledger.post(p_entries ledger.entry[], p_at timestamptz) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with entries as (
        select distinct on (e.cause)
            surety.new_id('pst', p_at) as id,
            e.cause,
            e.rule,
            e.payment_id,
            e.merchant_id,
            e.provider_owner,
            e.currency,
            e.gross,
            e.fee,
            e.net,
            e.platform_fee,
            e.excess,
            e.other_currency,
            e.other_gross,
            e.other_net
        from unnest(p_entries) as e
        order by e.cause
    ),

    posted as (
        insert into ledger.postings (id, cause, rule, payment_id, merchant_id, at)
        select
            entries.id,
            entries.cause,
            entries.rule,
            entries.payment_id,
            entries.merchant_id,
            p_at
        from entries
        order by entries.cause
        on conflict (cause) do nothing
        returning id
    ),

    amounts as (
        select
            entries.id as posting_id,
            rules.leg,
            rules.debit,
            rules.credit,
            entries.merchant_id,
            entries.provider_owner,
            case
                when rules.amount in ('other_gross', 'other_net') then entries.other_currency else entries.currency
            end as currency,
            case rules.amount
                when 'gross' then entries.gross
                when 'fee' then entries.fee
                when 'net' then entries.net
                when 'platform_fee' then entries.platform_fee
                when 'excess' then entries.excess
                when 'other_gross' then entries.other_gross
                when 'other_net' then entries.other_net
            end as amount_minor
        from entries
        inner join ledger.rules on entries.rule = rules.cause
        -- `is true` keeps this a look-up in a hash; the planner expects few rows and would compare each with each.
        where (entries.id in (select posted.id from posted)) is true
    ),

    legs as (
        select
            amounts.posting_id,
            amounts.leg,
            abs(amounts.amount_minor) as amount_minor,
            amounts.currency,
            case when amounts.amount_minor > 0 then amounts.debit else amounts.credit end as debit,
            case when amounts.amount_minor > 0 then amounts.credit else amounts.debit end as credit,
            amounts.merchant_id,
            amounts.provider_owner
        from amounts
        where amounts.amount_minor <> 0
    ),

    named as (
        select
            legs.posting_id,
            legs.leg,
            legs.amount_minor,
            legs.currency,
            legs.debit,
            legs.credit,
            case debits.owner
                when 'merchant' then legs.merchant_id
                when 'provider' then legs.provider_owner
                when 'platform' then 'platform'
            end as debit_owner,
            case credits.owner
                when 'merchant' then legs.merchant_id
                when 'provider' then legs.provider_owner
                when 'platform' then 'platform'
            end as credit_owner
        from legs
        inner join ledger.account_kinds as debits on legs.debit = debits.kind
        inner join ledger.account_kinds as credits on legs.credit = credits.kind
    ),

    used as (
        select
            named.debit as kind,
            named.debit_owner as owner_id,
            named.currency
        from named
        union
        select
            named.credit,
            named.credit_owner,
            named.currency
        from named
    ),

    opened as (
        insert into ledger.accounts (id, kind, owner_id, currency)
        select
            used.kind || ':' || used.owner_id || ':' || used.currency,
            used.kind,
            used.owner_id,
            used.currency
        from used
        -- A scalar look-up per account used, never a join with all accounts.
        where (
            select accounts.id from ledger.accounts
            where accounts.id = used.kind || ':' || used.owner_id || ':' || used.currency
        ) is null
        order by 1
        -- Without a target, for the key with the currency is unique, too, and who comes second may meet it first.
        on conflict do nothing
    ),

    moved as (
        insert into ledger.transfers (posting_id, leg, debit_account, credit_account, amount_minor, currency)
        select
            named.posting_id,
            named.leg,
            named.debit || ':' || named.debit_owner || ':' || named.currency,
            named.credit || ':' || named.credit_owner || ':' || named.currency,
            named.amount_minor,
            named.currency
        from named
        returning posting_id
    )

    select count(*)::integer from moved;
end;

comment on function ledger.post(ledger.entry[], timestamptz) is
'Posts each cause that has not posted yet, by ledger.rules; returns the number of transfers. A negative amount moves the
other way, nothing moves for zero. Call it last in a transaction: it locks merchants'' balances, in sorted order.';

create or replace function ledger.keep_balances() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into ledger.balances as kept (account_id, balance_minor)
    select moved.account_id, sum(moved.amount_minor)
    from (
        select credit_account as account_id, amount_minor from new_transfers
        union all
        select debit_account, - amount_minor from new_transfers
    ) as moved
    where split_part(moved.account_id, ':', 1) in (select kind from ledger.account_kinds where keeps_balance)
    group by moved.account_id
    order by moved.account_id
    on conflict (account_id) do update set balance_minor = kept.balance_minor + excluded.balance_minor;
    return null;
end;
$$;

create or replace trigger transfers_keep_balances after insert on ledger.transfers
referencing new table as new_transfers for each statement execute function ledger.keep_balances();

create or replace function ledger.fee(
    p_amount_minor bigint, p_basis_points integer, p_fixed_minor bigint
) returns bigint
language sql immutable parallel safe
begin atomic
    select least(p_amount_minor, (p_amount_minor * p_basis_points + 5000) / 10000 + p_fixed_minor);
end;

comment on function ledger.fee(bigint, integer, bigint) is
'Our fee in minor units: basis points rounded half up, plus the fixed part, never more than the amount.';
