-- Money limits: how many payments, and how much money, a merchant may accept in a UTC day, for each currency.
--
-- Exact: the lock of the limit's row serializes the transactions that accept payments under it
-- (surety.judge_new_payments). A new limit locks its merchant: transactions that have stored payments of it end first,
-- and those that have not seen the limit find it after they have stored theirs, and are repeated (api.create_payments).

create or replace function surety.count_accepted_money(p_merchant_id text, p_currency text, p_day date)
returns table (payments bigint, amount_minor bigint)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- A payment's id begins with the time of its acceptance.
    select
        count(*),
        coalesce(sum(payments.amount_minor), 0)::bigint
    from surety.payments
    where
        payments.merchant_id = p_merchant_id
        and payments.currency = p_currency
        and payments.id >= surety.id_at('pay', p_day::timestamp at time zone 'UTC')
        and payments.id < surety.id_at('pay', (p_day + 1)::timestamp at time zone 'UTC');
end;

comment on function surety.count_accepted_money(text, text, date) is
'The payments that a merchant accepted in a currency on a UTC day, whatever became of them: their number, and their sum
in minor units.';

create or replace function surety.set_money_limit(
    p_merchant_id text, p_currency text, p_count_max bigint, p_amount_max_minor bigint,
    p_actor text default session_user
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_old surety.money_limits;
    v_is_removal boolean := p_count_max is null and p_amount_max_minor is null;
begin
    select l.* into v_old from surety.money_limits as l
    where l.merchant_id = p_merchant_id and l.currency = p_currency for update;
    if not found then
        -- Waits for the transactions that have stored payments of the merchant: each holds its row by a foreign key.
        perform from surety.merchants as m where m.id = p_merchant_id for update;
        if not found then
            return null;
        end if;
        -- A transaction that held the merchant's row may have set a first limit.
        select l.* into v_old from surety.money_limits as l
        where l.merchant_id = p_merchant_id and l.currency = p_currency for update;
    end if;
    if not v_is_removal then
        p_count_max := coalesce(p_count_max, v_old.count_max);
        p_amount_max_minor := coalesce(p_amount_max_minor, v_old.amount_max_minor);
    end if;
    if (v_old.count_max, v_old.amount_max_minor) is not distinct from (p_count_max, p_amount_max_minor) then
        perform surety.await_standbys();
        return false;
    elsif v_is_removal then
        delete from surety.money_limits as l where l.merchant_id = p_merchant_id and l.currency = p_currency;
    elsif v_old.merchant_id is not null then
        update surety.money_limits as l
        set count_max = p_count_max, amount_max_minor = p_amount_max_minor, set_by = p_actor, set_at = v_now
        where l.merchant_id = p_merchant_id and l.currency = p_currency;
    else
        insert into surety.money_limits (merchant_id, currency, count_max, amount_max_minor, set_by, set_at)
        values (p_merchant_id, p_currency, p_count_max, p_amount_max_minor, p_actor, v_now);
    end if;
    perform surety.audit_operator_action(
        p_actor, p_merchant_id,
        'money limit ' || case when v_is_removal then 'removed' else 'set' end,
        jsonb_build_object('currency', p_currency, 'count', p_count_max, 'amount', p_amount_max_minor));
    return true;
end;
$$;

comment on function surety.set_money_limit(text, text, bigint, bigint, text) is
'Sets how many payments, and how much in minor units, a merchant may accept in a currency in a UTC day. What was
accepted today counts. Null keeps that part of the limit; both null remove it. False if nothing changed, null for an
unknown merchant.';

create or replace function surety.list_money_limits(p_merchant_id text)
returns table (
    merchant_id text, currency text, count_max bigint, amount_max_minor bigint, day date, payments bigint,
    amount_minor bigint, set_by text, set_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        money_limits.merchant_id,
        money_limits.currency,
        money_limits.count_max,
        money_limits.amount_max_minor,
        today.day,
        coalesce(accepted_money.payments, counted.payments),
        coalesce(accepted_money.amount_minor, counted.amount_minor),
        money_limits.set_by,
        money_limits.set_at
    from surety.money_limits
    cross join (select (surety.time_now() at time zone 'UTC')::date as day) as today
    left join surety.accepted_money
        on
            money_limits.merchant_id = accepted_money.merchant_id and money_limits.currency = accepted_money.currency
            and today.day = accepted_money.day
    left join lateral
        surety.count_accepted_money(money_limits.merchant_id, money_limits.currency, today.day) as counted
        on accepted_money.day is null
    where p_merchant_id is null or money_limits.merchant_id = p_merchant_id
    order by money_limits.merchant_id, money_limits.currency;
end;

comment on function surety.list_money_limits(text) is
'The money limits of a merchant, or all: their bounds, and what was accepted on the present UTC day. Amounts are in
minor units.';

create or replace function surety.delete_old_accepted_money() returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with deleted as (
        delete from surety.accepted_money
        where accepted_money.day < (surety.time_now() at time zone 'UTC')::date - 30
        returning accepted_money.day
    )

    select count(*)::integer from deleted;
end;

comment on function surety.delete_old_accepted_money() is
'Deletes the counters of money limits that are older than 30 days; returns how many.';
