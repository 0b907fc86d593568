-- Balances as of any time: final postings, the balances of each day, and sums from these on.
--
-- The time of a posting is that of its booking (ledger.postings.at, and the head of its id), not that of the
-- provider's record. So a record that arrives late changes no balance of the past. A day's postings are final from ten
-- minutes after its end on; until then a transaction that is still open may add one.

create or replace function ledger.end_days() returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The lock waits for all transactions that have posted; those that post later see the new end. It holds others up, so
-- it is given up after a second, and taken again by the next run.
declare
    v_end timestamptz := date_trunc('day', surety.time_now() - interval '10 minutes', 'UTC');
begin
    if v_end <= (select f.ends_at from ledger.final_postings as f) then
        return true;
    end if;
    begin
        perform set_config('lock_timeout', '1s', true);
        lock table ledger.transfers in share mode;
    exception
        when lock_not_available then
            return false;
    end;
    update ledger.final_postings as f set ends_at = v_end, end_id = surety.id_at('pst', v_end)
    where f.ends_at < v_end;
    return true;
end;
$$;

comment on function ledger.end_days() is
'Makes the postings of all days final that ended ten minutes ago or earlier. False if open transactions prevented it for
a second; it is to be repeated then. A posting that comes later is booked on the day after them.';

create or replace function ledger.sum_transfers(p_from timestamptz, p_to timestamptz)
returns table (account_id text, amount_minor bigint)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        legs.account_id,
        sum(legs.amount_minor)::bigint
    from (
        select
            transfers.credit_account as account_id,
            transfers.amount_minor
        from ledger.transfers
        where
            transfers.posting_id >= surety.id_at('pst', p_from) and transfers.posting_id < surety.id_at('pst', p_to)
        union all
        select
            transfers.debit_account,
            -transfers.amount_minor
        from ledger.transfers
        where
            transfers.posting_id >= surety.id_at('pst', p_from) and transfers.posting_id < surety.id_at('pst', p_to)
    ) as legs
    group by legs.account_id;
end;

comment on function ledger.sum_transfers(timestamptz, timestamptz) is
'Credits minus debits of each account by the postings from p_from until before p_to, in minor units.';

create or replace function ledger.sum_day() returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_final ledger.final_postings;
    v_first text;
    v_day timestamptz;
begin
    select f.* into v_final from ledger.final_postings as f for no key update;
    select min(t.posting_id) into v_first
    from ledger.transfers as t
    where t.posting_id >= surety.id_at('pst', v_final.summed_to) and t.posting_id < v_final.end_id;
    if v_first is null then
        update ledger.final_postings as f set summed_to = f.ends_at where f.summed_to < f.ends_at;
        return false;
    end if;
    v_day := date_trunc(
        'day', to_timestamp(('x' || lpad(substr(v_first, 5, 11), 16, '0'))::bit(64)::bigint / 1000.0), 'UTC');
    insert into ledger.daily_balances (account_id, day, balance_minor)
    select m.account_id, (v_day at time zone 'UTC')::date, coalesce(b.balance_minor, 0) + m.amount_minor
    from ledger.sum_transfers(v_day, v_day + interval '1 day') as m
    left join lateral (
        select d.balance_minor from ledger.daily_balances as d where d.account_id = m.account_id
        order by d.day desc limit 1
    ) as b on true;
    update ledger.final_postings as f set summed_to = v_day + interval '1 day';
    return true;
end;
$$;

comment on function ledger.sum_day() is
'Stores the balances of the first final day with postings that has none yet. False if there is no such day.';

create or replace function ledger.merchant_balances_at(p_merchant_id text, p_at timestamptz)
returns table (account_id text, kind text, currency text, balance_minor bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_custom_plan
as $$
-- Planned for each call: a plan for all periods and merchants would read the postings of all.
-- The last balance of a day before p_at, and the merchant's postings since, by their index.
declare
    v_from timestamptz := (
        select least(f.summed_to, date_trunc('day', p_at, 'UTC')) from ledger.final_postings as f);
    v_first text := surety.id_at('pst', v_from);
    v_end text := surety.id_at('pst', p_at);
begin
    return query
    with moved as (
        select l.account_id, sum(l.amount_minor)::bigint as amount_minor
        from ledger.postings as g
        join ledger.transfers as t on t.posting_id = g.id and t.posting_id >= v_first and t.posting_id < v_end
        cross join lateral (
            values (t.credit_account, t.amount_minor), (t.debit_account, - t.amount_minor)
        ) as l (account_id, amount_minor)
        where g.merchant_id = p_merchant_id and g.id >= v_first and g.id < v_end
            and split_part(l.account_id, ':', 2) = p_merchant_id
        group by l.account_id
    )
    select a.id, a.kind, a.currency, coalesce(d.balance_minor, 0) + coalesce(m.amount_minor, 0)
    from ledger.account_kinds as k
    -- The ids of one owner and kind are neighbours: kind:owner:currency.
    join ledger.accounts as a
        on a.id > k.kind || ':' || p_merchant_id || ':' and a.id < k.kind || ':' || p_merchant_id || ';'
    left join moved as m on m.account_id = a.id
    left join lateral (
        select b.balance_minor from ledger.daily_balances as b
        where b.account_id = a.id and b.day < (v_from at time zone 'UTC')::date
        order by b.day desc limit 1
    ) as d on true
    where k.owner = 'merchant' and (d.balance_minor is not null or m.amount_minor is not null)
    order by a.id;
end;
$$;

comment on function ledger.merchant_balances_at(text, timestamptz) is
'Credits minus debits of a merchant''s accounts, in minor units, by the postings that were booked before p_at. An
account without such postings has no row.';

create or replace function ledger.balances_at(p_at timestamptz)
returns table (account_id text, kind text, owner_id text, currency text, balance_minor bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with bounds as (
        select least(final_postings.summed_to, date_trunc('day', p_at, 'UTC')) as summed_to
        from ledger.final_postings
    ),

    moved as (
        select
            sums.account_id,
            sums.amount_minor
        from bounds cross join lateral ledger.sum_transfers(bounds.summed_to, p_at) as sums
    )

    select
        accounts.id,
        accounts.kind,
        accounts.owner_id,
        accounts.currency,
        coalesce(kept.balance_minor, 0) + coalesce(moved.amount_minor, 0)
    from ledger.accounts
    cross join bounds
    left join moved on accounts.id = moved.account_id
    left join lateral (
        select daily_balances.balance_minor
        from ledger.daily_balances
        where
            daily_balances.account_id = accounts.id
            and daily_balances.day < (bounds.summed_to at time zone 'UTC')::date
        order by daily_balances.day desc
        limit 1
    ) as kept on true
    where kept.balance_minor is not null or moved.amount_minor is not null
    order by accounts.id;
end;

comment on function ledger.balances_at(timestamptz) is
'Credits minus debits of all accounts, in minor units, by the postings that were booked before p_at. An account without
such postings has no row. Reads the postings since the last day that is summed.';
