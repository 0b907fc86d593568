-- Payouts to merchants: what we owe them leaves as one instruction. The transfer is made outside; an operator marks it.
--
--   asked     its amount is reserved: available -> reserved_for_payouts
--   left      the transfer was made: reserved_for_payouts -> bank
--   returned  it came back: bank -> available
--   canceled  it never left: reserved_for_payouts -> available
--
-- A payout, its transfers, its event and its audit entry are one transaction, so a process that dies leaves no half of
-- one. Payouts to one merchant are made one after another, because each locks the merchant's row.

create or replace function surety.render_merchant_payout(p surety.merchant_payouts) returns json
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select json_build_object(
        'id', p.id,
        'object', 'merchant_payout',
        'status', p.state,
        'amount', p.amount_minor,
        'currency', p.currency,
        'schedule', p.schedule,
        'period_begins', p.period_begins,
        'created_at', surety.format_time(p.created_at),
        'sent_at', surety.format_time(p.sent_at),
        'proof', p.proof,
        'ended_at', surety.format_time(p.ended_at),
        'reason', p.reason
    );
end;

comment on function surety.render_merchant_payout(surety.merchant_payouts) is
'A payout to a merchant as the merchant sees it.';

create or replace function surety.offer_merchant_payout(p_merchant_id text, p_currency text, p_at timestamptz)
returns table (available_minor bigint, reserve_minor bigint, minimum_minor bigint, amount_minor bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_terms surety.merchant_payout_terms;
    v_step bigint := (select c.step_minor from surety.currencies as c where c.currency = p_currency);
    v_account text := ledger.account_id('available', p_merchant_id, p_currency);
    v_first text;
    v_settled numeric := 0;
begin
    select t.* into v_terms
    from surety.merchant_payout_terms as t
    where t.merchant_id = p_merchant_id and t.currency = p_currency;
    available_minor := coalesce((select b.balance_minor from ledger.balances as b where b.account_id = v_account), 0);
    minimum_minor := coalesce(v_terms.minimum_minor, 1);
    if v_terms.reserve_days > 0 then
        v_first := surety.id_at('pst', p_at - make_interval(days => v_terms.reserve_days));
        select coalesce(sum(t.amount_minor), 0) into v_settled
        from ledger.postings as g
        join ledger.transfers as t on t.posting_id = g.id and t.posting_id >= v_first
        where g.merchant_id = p_merchant_id and g.id >= v_first and g.rule in ('settled', 'settled_exchanged')
            and t.credit_account = v_account;
    end if;
    reserve_minor := ceil(v_settled * coalesce(v_terms.reserve_basis_points, 0) / 10000);
    amount_minor := greatest(available_minor - reserve_minor, 0);
    amount_minor := amount_minor - amount_minor % v_step;
    return next;
end;
$$;

comment on function surety.offer_merchant_payout(text, text, timestamptz) is
'What a merchant could be paid out at p_at, in minor units: the available balance, which may be negative, less the
reserve, in whole steps of the currency, and at least zero. The reserve is the part of the money settled within the days
of the merchant''s terms, rounded up. One row.';

create or replace function surety.announce_merchant_payout(p_payout surety.merchant_payouts, p_by text)
returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    perform audit.write_entry(
        case when p_by like 'operator:%' then 'operator' else 'system' end, p_by,
        'merchant payout ' || p_payout.state, p_payout.reason, p_merchant_id => p_payout.merchant_id,
        p_snapshot => jsonb_build_object(
            'merchant_payout', p_payout.id, 'amount', p_payout.amount_minor, 'currency', p_payout.currency,
            'proof', p_payout.proof));
    perform outbox.emit_event(
        'merchant_payout', p_payout.id,
        case p_payout.state
            when 'asked' then 'merchant_payout.asked'
            when 'left' then 'merchant_payout.left'
            when 'returned' then 'merchant_payout.returned'
            when 'canceled' then 'merchant_payout.canceled'
        end,
        jsonb_build_object(
            'at', surety.format_time(v_now), 'merchant_payout', surety.render_merchant_payout(p_payout)),
        p_payout.merchant_id, null);
    -- Last, because it locks balances.
    perform ledger.post(
        array[
            ledger.entry(
                p_cause => p_payout.id || ':' || p_payout.state, p_rule => 'merchant_payout_' || p_payout.state,
                p_provider_owner => 'stripe/', p_currency => p_payout.currency, p_merchant_id => p_payout.merchant_id,
                p_gross => p_payout.amount_minor)
        ],
        v_now);
end;
$$;

comment on function surety.announce_merchant_payout(surety.merchant_payouts, text) is
'Audits a payout that entered its state, emits its event and posts its amount, once for each state.';

create or replace function surety.create_merchant_payout(
    p_merchant_id text, p_currency text, p_schedule text, p_by text
) returns table (outcome text, payout_id text, amount_minor bigint)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_now timestamptz := surety.time_now();
    v_merchant surety.merchants;
    v_offer record;
    v_payout surety.merchant_payouts;
    v_period date := (case p_schedule
        when 'weekly' then date_trunc('week', v_now, 'UTC')
        when 'monthly' then date_trunc('month', v_now, 'UTC')
        else date_trunc('day', v_now, 'UTC')
    end at time zone 'UTC')::date;
begin
    -- One payout of a merchant at a time; then its balance, so that a refund meanwhile waits for the rest.
    select m.* into v_merchant from surety.merchants as m where m.id = p_merchant_id for no key update;
    if not found then
        return query select 'no_merchant', null::text, null::bigint;
        return;
    elsif v_merchant.provider_account <> '' then
        return query select 'own_account', null::text, null::bigint;
        return;
    elsif v_merchant.suspended_at is not null then
        return query select 'suspended', null::text, null::bigint;
        return;
    end if;
    perform from ledger.balances as b
    where b.account_id = ledger.account_id('available', p_merchant_id, p_currency)
    for no key update;
    select o.* into v_offer from surety.offer_merchant_payout(p_merchant_id, p_currency, v_now) as o;
    select k.* into v_payout
    from surety.merchant_payouts as k
    where k.merchant_id = p_merchant_id and k.currency = p_currency and k.schedule = p_schedule
        and k.period_begins = v_period and k.state <> 'canceled';
    if found then
        perform surety.await_standbys();
        return query select 'exists', v_payout.id, v_payout.amount_minor;
        return;
    elsif v_offer.available_minor < 0 then
        return query select 'negative', null::text, v_offer.available_minor;
        return;
    elsif v_offer.amount_minor < greatest(v_offer.minimum_minor, 1) then
        return query select 'below_minimum', null::text, v_offer.amount_minor;
        return;
    end if;
    insert into surety.merchant_payouts (
        id, merchant_id, currency, amount_minor, schedule, period_begins, created_at, created_by
    )
    values (
        surety.new_id('mpo', v_now), p_merchant_id, p_currency, v_offer.amount_minor, p_schedule, v_period, v_now, p_by
    )
    returning * into v_payout;
    perform surety.announce_merchant_payout(v_payout, p_by);
    return query select 'created', v_payout.id, v_payout.amount_minor;
end;
$$;

comment on function surety.create_merchant_payout(text, text, text, text) is
'Makes a payout of all that a merchant is owed in a currency, less its reserve. outcome: created, exists (the payout of
this period), or none: no_merchant, own_account (its money is its own), suspended, negative (amount_minor is what it
owes us), below_minimum (amount_minor is less). p_schedule decides the period: manual and daily are days.';

create or replace function surety.create_due_merchant_payouts(p_by text, p_limit integer default 100) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_due record;
    v_outcome text;
    v_created integer := 0;
begin
    for v_due in
        select t.merchant_id, t.currency, t.schedule
        from surety.merchant_payout_terms as t
        join surety.merchants as m on m.id = t.merchant_id
        cross join lateral surety.offer_merchant_payout(t.merchant_id, t.currency, v_now) as o
        where t.schedule <> 'manual' and m.provider_account = '' and m.suspended_at is null
            and o.amount_minor >= o.minimum_minor
            and not exists (
                select from surety.merchant_payouts as k
                where k.merchant_id = t.merchant_id and k.currency = t.currency and k.schedule = t.schedule
                    and k.state <> 'canceled'
                    and k.period_begins = (date_trunc(case t.schedule
                        when 'weekly' then 'week'
                        when 'monthly' then 'month'
                        else 'day'
                    end, v_now, 'UTC') at time zone 'UTC')::date
            )
        order by t.merchant_id, t.currency
        limit p_limit
    loop
        select c.outcome into v_outcome
        from surety.create_merchant_payout(v_due.merchant_id, v_due.currency, v_due.schedule, p_by) as c;
        v_created := v_created + (v_outcome = 'created')::integer;
    end loop;
    return v_created;
end;
$$;

comment on function surety.create_due_merchant_payouts(text, integer) is
'Makes the payouts that schedules ask for now, at most p_limit; returns how many. Zero if none is due. A period without
enough money gets its payout later in the period. It may be repeated and run concurrently.';

create or replace function surety.move_merchant_payout(
    p_id text, p_to text, p_proof text, p_reason text, p_by text
) returns table (outcome text, state text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_payout surety.merchant_payouts;
begin
    perform from surety.merchants as m
    join surety.merchant_payouts as k on k.merchant_id = m.id
    where k.id = p_id
    for no key update of m;
    select k.* into v_payout from surety.merchant_payouts as k where k.id = p_id for no key update;
    if not found then
        return query select 'not_found', null::text;
        return;
    elsif v_payout.state = p_to and v_payout.proof is not distinct from coalesce(p_proof, v_payout.proof) then
        perform surety.await_standbys();
        return query select 'unchanged', v_payout.state;
        return;
    elsif (v_payout.state, p_to) not in (('asked', 'left'), ('asked', 'canceled'), ('left', 'returned')) then
        return query select 'refused', v_payout.state;
        return;
    end if;
    update surety.merchant_payouts as k
    set state = p_to,
        sent_at = case when p_to = 'left' then surety.time_now() else k.sent_at end,
        proof = case when p_to = 'left' then p_proof else k.proof end,
        ended_at = case when p_to <> 'left' then surety.time_now() end,
        reason = case when p_to <> 'left' then p_reason end
    where k.id = p_id
    returning * into v_payout;
    perform surety.announce_merchant_payout(v_payout, p_by);
    return query select 'changed', v_payout.state;
end;
$$;

comment on function surety.move_merchant_payout(text, text, text, text, text) is
'Marks a payout as left, with the proof of its transfer, or as returned or canceled, with the reason. outcome: changed;
unchanged (it is so already); refused: its state does not lead there; not_found. Raises
proof_is_of_one_merchant_payout.';

create or replace function surety.set_merchant_payout_terms(
    p_merchant_id text, p_currencies text[], p_schedule text, p_minimum_minor bigint, p_reserve_basis_points integer,
    p_reserve_days integer, p_actor text
) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_changed text [];
begin
    perform from surety.merchants as m where m.id = p_merchant_id for no key update;
    if not found then
        return null;
    end if;
    with changed as (
        insert into surety.merchant_payout_terms as known (
            merchant_id, currency, schedule, minimum_minor, reserve_basis_points, reserve_days, set_by, set_at
        )
        select
            p_merchant_id, asked.currency, coalesce(p_schedule, 'manual'), coalesce(p_minimum_minor, 1),
            coalesce(p_reserve_basis_points, 0), coalesce(p_reserve_days, 0), p_actor, v_now
        from unnest(p_currencies) as asked (currency)
        order by asked.currency
        on conflict (merchant_id, currency) do update
        set schedule = coalesce(p_schedule, known.schedule),
            minimum_minor = coalesce(p_minimum_minor, known.minimum_minor),
            reserve_basis_points = coalesce(p_reserve_basis_points, known.reserve_basis_points),
            reserve_days = coalesce(p_reserve_days, known.reserve_days),
            set_by = p_actor, set_at = v_now
        where (
            coalesce(p_schedule, known.schedule), coalesce(p_minimum_minor, known.minimum_minor),
            coalesce(p_reserve_basis_points, known.reserve_basis_points),
            coalesce(p_reserve_days, known.reserve_days)
        ) <> (known.schedule, known.minimum_minor, known.reserve_basis_points, known.reserve_days)
        returning currency
    )
    select array_agg(c.currency order by c.currency) into v_changed from changed as c;
    if v_changed is null then
        perform surety.await_standbys();
        return 0;
    end if;
    perform surety.audit_operator_action(
        p_actor, p_merchant_id, 'merchant payout terms changed',
        jsonb_strip_nulls(jsonb_build_object(
            'currencies', to_jsonb(v_changed), 'schedule', p_schedule, 'minimum_minor', p_minimum_minor,
            'reserve_basis_points', p_reserve_basis_points, 'reserve_days', p_reserve_days)));
    return cardinality(v_changed);
end;
$$;

comment on function surety.set_merchant_payout_terms(text, text[], text, bigint, integer, integer, text) is
'Sets when a merchant is paid out in some currencies; a part that is null stays. Returns for how many currencies the
terms changed, null for an unknown merchant.';
