-- Merchants: added, changed, suspended and resumed by operators, with the fees that they pay. Every change writes an
-- audit entry.

create or replace function surety.audit_operator_action(
    p_actor text, p_merchant_id text, p_outcome text, p_snapshot jsonb
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select audit.write_entry(
        'operator', 'operator:' || p_actor, p_outcome, p_merchant_id => p_merchant_id, p_snapshot => p_snapshot
    );
end;

comment on function surety.audit_operator_action(text, text, text, jsonb) is
'Writes an operator''s action into the audit trail, in the transaction of that action.';

create or replace function surety.add_merchant(
    p_name text, p_provider_account text default '', p_actor text default session_user
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with added as (
        insert into surety.merchants (id, name, provider_account, created_at, livemode)
        select
            surety.new_id('mer', surety.time_now()), p_name, surety.require_merchants_account(p_provider_account),
            surety.time_now(), environment.livemode
        from surety.environment
        returning merchants.id
    )

    select added.id
    from added, surety.audit_operator_action(
        p_actor, added.id, 'merchant added', jsonb_build_object('name', p_name, 'provider_account', p_provider_account)
    );
end;

comment on function surety.add_merchant(text, text, text) is
'Adds a merchant and returns its id. The provider account is empty for the platform''s own, whose id is refused
(merchant_has_no_account_of_the_platform).';

create or replace function surety.suspend_merchant(
    p_merchant_id text, p_is_suspended boolean, p_actor text default session_user
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update surety.merchants
        set suspended_at = case when p_is_suspended then surety.time_now() end
        where merchants.id = p_merchant_id and (merchants.suspended_at is not null) <> p_is_suspended
        returning merchants.id
    ),

    audited as (
        select changed.id
        from changed, surety.audit_operator_action(
            p_actor, changed.id, case when p_is_suspended then 'merchant suspended' else 'merchant resumed' end, '{}'
        )
    )

    select (select count(*) > 0 from audited)
    from surety.merchants cross join surety.await_standbys()
    where merchants.id = p_merchant_id;
end;

comment on function surety.suspend_merchant(text, boolean, text) is
'Suspends or resumes a merchant. False if nothing changed, null for an unknown merchant.';

create or replace function surety.set_merchant(
    p_merchant_id text, p_name text, p_provider_account text, p_actor text default session_user
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_before surety.merchants;
    v_now timestamptz := surety.time_now();
begin
    -- The same lock as that of a new key, so no key is made meanwhile.
    select m.* into v_before from surety.merchants as m where m.id = p_merchant_id for update;
    if not found then
        return null;
    elsif coalesce(p_name, v_before.name) = v_before.name
        and coalesce(p_provider_account, v_before.provider_account) = v_before.provider_account
    then
        return 'unchanged';
    elsif p_provider_account <> v_before.provider_account then
        -- Payments name the account that they were made on, and accounts of merchants are polled. A request that has
        -- read the old account ends within a minute.
        if exists (select from surety.payments as p where p.merchant_id = p_merchant_id)
            or exists (select from surety.customers as c where c.merchant_id = p_merchant_id)
        then
            return 'has-payments';
        elsif exists (select from surety.api_keys as k where k.merchant_id = p_merchant_id)
            and coalesce(v_before.suspended_at > v_now - interval '1 minute', true)
        then
            return 'has-keys';
        end if;
        perform surety.require_merchants_account(p_provider_account);
    end if;
    update surety.merchants as m
    set name = coalesce(p_name, m.name), provider_account = coalesce(p_provider_account, m.provider_account)
    where m.id = p_merchant_id;
    perform surety.audit_operator_action(
        p_actor, p_merchant_id, 'merchant changed',
        jsonb_strip_nulls(jsonb_build_object(
            'name', nullif(p_name, v_before.name),
            'name_before', case when p_name <> v_before.name then v_before.name end,
            'provider_account', nullif(p_provider_account, v_before.provider_account),
            'provider_account_before',
            case when p_provider_account <> v_before.provider_account then v_before.provider_account end)));
    return 'changed';
end;
$$;

comment on function surety.set_merchant(text, text, text, text) is
'Changes a merchant''s name or account; null leaves it. changed, unchanged, or a refusal of another account:
has-payments (or customers), or has-keys if it is not suspended for a minute. Null for an unknown merchant.';

create or replace function surety.set_fee_rates(
    p_merchant_id text, p_currencies text[], p_basis_points integer, p_fixed_minor bigint,
    p_effective_at timestamptz, p_actor text default session_user
) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_from timestamptz := coalesce(p_effective_at, v_now + interval '1 minute');
    v_count integer;
begin
    perform from surety.merchants as m where m.id = p_merchant_id for no key update;
    if not found then
        return null;
    end if;
    if exists (
        select from surety.currencies as c where c.currency = any(p_currencies) and p_fixed_minor >= c.minimum_minor
    ) then
        raise exception 'the fixed part is no less than the smallest amount' using
            errcode = 'check_violation', schema = 'surety', table = 'fee_rates',
            constraint = 'fee_rate_is_below_the_smallest_amount';
    end if;
    insert into surety.fee_rates (merchant_id, currency, effective_at, basis_points, fixed_minor, set_by, set_at)
    select
        p_merchant_id, asked.currency, v_from, coalesce(p_basis_points, t.basis_points),
        coalesce(p_fixed_minor, t.fixed_minor), p_actor, v_now
    from unnest(p_currencies) as asked (currency)
    left join lateral surety.fee_terms(p_merchant_id, asked.currency, v_from) as t on true
    where (coalesce(p_basis_points, t.basis_points), coalesce(p_fixed_minor, t.fixed_minor))
        is distinct from (t.basis_points, t.fixed_minor)
    order by asked.currency;
    get diagnostics v_count = row_count;
    if v_count = 0 then
        perform surety.await_standbys();
        return 0;
    end if;
    perform surety.audit_operator_action(
        p_actor, p_merchant_id, 'fees changed',
        jsonb_build_object('rates', (
            select jsonb_agg(jsonb_build_object(
                'currency', r.currency, 'basis_points', r.basis_points, 'fixed_minor', r.fixed_minor,
                'effective_at', surety.format_time(r.effective_at)) order by r.currency)
            from surety.fee_rates as r
            where r.merchant_id = p_merchant_id and r.effective_at = v_from and r.set_at = v_now
                and r.currency = any(p_currencies)
        )));
    return v_count;
end;
$$;

comment on function surety.set_fee_rates(text, text[], integer, bigint, timestamptz, text) is
'Sets a merchant''s fees in some currencies from a time on, at least a minute ahead, or in a minute; a part that is null
stays as it is then. Returns for how many currencies the fees differ from those in force then, null for an unknown
merchant.';

create or replace function surety.withdraw_fee_rates(
    p_merchant_id text, p_currencies text[], p_effective_at timestamptz, p_actor text default session_user
) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_withdrawn text [];
begin
    perform from surety.merchants as m where m.id = p_merchant_id for no key update;
    if not found then
        return null;
    end if;
    with withdrawn as (
        insert into surety.fee_rate_withdrawals (merchant_id, currency, effective_at, withdrawn_by, withdrawn_at)
        select r.merchant_id, r.currency, r.effective_at, p_actor, surety.time_now()
        from surety.fee_rates as r
        where r.merchant_id = p_merchant_id and r.currency = any(p_currencies) and r.effective_at = p_effective_at
            and not exists (
                select from surety.fee_rate_withdrawals as w
                where w.merchant_id = r.merchant_id and w.currency = r.currency and w.effective_at = r.effective_at
            )
        returning currency
    )
    select array_agg(w.currency order by w.currency) into v_withdrawn from withdrawn as w;
    if v_withdrawn is null then
        perform surety.await_standbys();
        return 0;
    end if;
    perform surety.audit_operator_action(
        p_actor, p_merchant_id, 'fees withdrawn',
        jsonb_build_object('effective_at', surety.format_time(p_effective_at), 'currencies', to_jsonb(v_withdrawn)));
    return cardinality(v_withdrawn);
end;
$$;

comment on function surety.withdraw_fee_rates(text, text[], timestamptz, text) is
'Withdraws the changes of a merchant''s fees that begin at p_effective_at, in these currencies. Returns how many, not
counting those that were withdrawn before; null for an unknown merchant. Raises fee_rate_is_withdrawn_before_it_begins
if they have begun, or begin within a minute.';

create or replace function surety.list_fee_rates(p_merchant_id text)
returns table (
    currency text, basis_points integer, fixed_minor bigint, effective_at timestamptz, is_in_force boolean,
    is_past boolean, withdrawn_at timestamptz
)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        currencies.currency,
        rates.basis_points,
        rates.fixed_minor,
        rates.effective_at,
        rates.withdrawn_at is null
        and coalesce(rates.effective_at, '-infinity') = coalesce(present.effective_at, '-infinity'),
        coalesce(rates.effective_at, '-infinity') < coalesce(present.effective_at, '-infinity'),
        rates.withdrawn_at
    from surety.merchants
    cross join surety.currencies
    cross join lateral surety.fee_terms(merchants.id, currencies.currency, surety.read_clock()) as present
    cross join lateral (
        select
            merchants.fee_basis_points as basis_points,
            currencies.fee_fixed_minor as fixed_minor,
            null::timestamptz as effective_at,
            null::timestamptz as withdrawn_at
        union all
        select
            fee_rates.basis_points,
            fee_rates.fixed_minor,
            fee_rates.effective_at,
            fee_rate_withdrawals.withdrawn_at
        from surety.fee_rates
        left join surety.fee_rate_withdrawals
            on
                fee_rates.merchant_id = fee_rate_withdrawals.merchant_id
                and fee_rates.currency = fee_rate_withdrawals.currency
                and fee_rates.effective_at = fee_rate_withdrawals.effective_at
        where fee_rates.merchant_id = merchants.id and fee_rates.currency = currencies.currency
    ) as rates
    where merchants.id = p_merchant_id
    order by currencies.currency asc, rates.effective_at asc nulls first;
end;

comment on function surety.list_fee_rates(text) is
'The fees of a merchant in each currency, with those of the past and of the future, and those that were withdrawn before
they began. effective_at is null for the rate that it began with. fixed_minor is in minor units.';
