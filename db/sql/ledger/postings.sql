-- Postings: writing double-entry transfers and keeping merchants' balances.
--
-- An entry says what moved money: a cause, a rule and amounts. ledger.rules turn it into transfers, one per leg.
-- A cause posts once: a repeated entry changes nothing.

create or replace function ledger.entry(
    p_cause text, p_rule text, p_provider_owner text, p_currency text, p_payment_id text default null,
    p_merchant_id text default null, p_gross bigint default null, p_fee bigint default null,
    p_net bigint default null, p_platform_fee bigint default null, p_excess bigint default null,
    p_other_currency text default null, p_other_gross bigint default null, p_other_net bigint default null
) returns ledger.entry
language sql immutable parallel safe
begin atomic
    -- One expression and no set clause, so that PostgreSQL inlines it.
    select (
        p_cause, p_rule, p_payment_id, p_merchant_id, p_provider_owner, p_currency, p_gross, p_fee, p_net,
        p_platform_fee, p_excess, p_other_currency, p_other_gross, p_other_net
    )::ledger.entry;
end;

comment on function ledger.entry(
    text, text, text, text, text, text, bigint, bigint, bigint, bigint, bigint, text, bigint, bigint
) is
'An entry for ledger.post, by named arguments. p_cause is unique for ever; p_rule is a ledger.rules.rule;
p_provider_owner is provider/account. Amounts in minor units: of p_currency, p_other_* of p_other_currency. An amount
that is left out moves nothing. p_fee is the provider''s fee, p_platform_fee ours.';

create or replace function ledger.platform_fee(
    p_amount_minor bigint, p_basis_points integer, p_fixed_minor bigint
) returns bigint
language sql immutable parallel safe
begin atomic
    -- Half up, and one less where the half has led to an odd number: those numbers leave 5000 of 20000.
    select least(
        p_amount_minor,
        (p_amount_minor * p_basis_points + 5000) / 10000
        - case when p_amount_minor * p_basis_points % 20000 = 5000 then 1 else 0 end
        + p_fixed_minor
    );
end;

comment on function ledger.platform_fee(bigint, integer, bigint) is
'Our fee in minor units: basis points rounded half to even, plus the fixed part, never more than the amount.';

create or replace function ledger.account_id(p_kind text, p_owner_id text, p_currency text) returns text
language sql immutable parallel safe
begin atomic
    select p_kind || ':' || p_owner_id || ':' || p_currency;
end;

comment on function ledger.account_id(text, text, text) is
'The id of the account of this kind, owner and currency; null where one of them is null.';

create or replace function ledger.post(p_entries ledger.entry[], p_at timestamptz) returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with booked as (
        -- A posting that would come after the end of its day's books is booked on the next day.
        select greatest(p_at, final_postings.ends_at) as at
        from ledger.final_postings
    ),

    entries as (
        select distinct on (e.cause)
            surety.new_id('pst', booked.at) as id,
            booked.at,
            e.*
        from booked cross join unnest(p_entries) as e
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
            entries.at
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
        inner join ledger.rules on entries.rule = rules.rule
        -- `is true` makes the planner use a hashed subplan; it expects few rows and would choose a nested loop.
        where (entries.id in (select posted.id from posted)) is true
    ),

    -- A negative amount moves the other way: its absolute value, with debit and credit exchanged.
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

    owned_legs as (
        select
            legs.*,
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

    used_accounts as (
        select
            owned_legs.debit as kind,
            owned_legs.debit_owner as owner_id,
            owned_legs.currency
        from owned_legs
        union
        select
            owned_legs.credit,
            owned_legs.credit_owner,
            owned_legs.currency
        from owned_legs
    ),

    opened_accounts as (
        insert into ledger.accounts (id, kind, owner_id, currency)
        select
            ledger.account_id(used.kind, used.owner_id, used.currency),
            used.kind,
            used.owner_id,
            used.currency
        from used_accounts as used
        -- A scalar look-up per account used, never a join with all accounts.
        where (
            select accounts.id from ledger.accounts
            where accounts.id = ledger.account_id(used.kind, used.owner_id, used.currency)
        ) is null
        order by 1
        -- No conflict target: (id, currency) is unique as well, and a concurrent insert may hit that index first.
        on conflict do nothing
    ),

    transferred as (
        insert into ledger.transfers (posting_id, leg, debit_account, credit_account, amount_minor, currency)
        select
            owned_legs.posting_id,
            owned_legs.leg,
            ledger.account_id(owned_legs.debit, owned_legs.debit_owner, owned_legs.currency),
            ledger.account_id(owned_legs.credit, owned_legs.credit_owner, owned_legs.currency),
            owned_legs.amount_minor,
            owned_legs.currency
        from owned_legs
        returning posting_id
    )

    select count(*)::integer from transferred;
end;

comment on function ledger.post(ledger.entry[], timestamptz) is
'Posts each cause that has not posted yet, by ledger.rules; returns the number of transfers. A negative amount moves the
other way, nothing moves for zero or null. The postings'' time is p_at, or the end of the final postings if that is
later. Call it last in a transaction: it locks merchants'' balances, in sorted order.';

create or replace function ledger.keep_balances() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp
as $$
begin
    -- A transaction that began before a day's books ended must not add to that day: it is repeated, and books later.
    if exists (
        select from new_transfers as n cross join ledger.final_postings as f where n.posting_id < f.end_id
    ) then
        raise exception 'the books of the day of this posting ended meanwhile' using errcode = 'serialization_failure';
    end if;
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

comment on function ledger.keep_balances() is
'Trigger: adds new transfers to ledger.balances, credits minus debits, for the kinds of accounts that keep a balance.
Raises serialization_failure for a transfer of final postings.';

create or replace trigger transfers_keep_balances after insert on ledger.transfers
referencing new table as new_transfers for each statement execute function ledger.keep_balances();
