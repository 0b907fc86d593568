-- Facts without a payment: those whose payment is not known yet, foreign money, and what has none by nature.

create or replace function surety.park_facts(p_facts jsonb, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
-- Facts without a payment. Payouts and the provider's own fees have none by nature and are booked at once.
declare
    v_entries ledger.entry [];
begin
    with parked as (
        insert into surety.parked_facts (
            id, provider, account, livemode, object_id, kind, revision, fact, parked_at, ended_at, ended_as
        )
        select
            surety.new_id('prk', p_at), f.fact ->> 'provider', f.fact ->> 'account', (f.fact ->> 'livemode')::boolean,
            f.fact ->> 'object_id', f.fact ->> 'kind', coalesce((f.fact ->> 'revision')::integer, 0), f.fact, p_at,
            case when k.is_unattached then p_at end, case when k.is_unattached then 'unattached' end
        from jsonb_array_elements(p_facts) as f (fact)
        cross join lateral (select surety.is_unattached(f.fact) as is_unattached) as k
        order by 2, 3, 4, 5, 6, 7
        on conflict (provider, account, livemode, object_id, kind, revision) do nothing
        returning *
    )
    select array_agg(surety.unattached_entry(
        k.fact, surety.money_rule(k.provider, k.fact -> 'data' ->> 'category', false)) order by k.object_id)
    into v_entries
    from parked as k where k.ended_as = 'unattached' and k.kind = 'money';
    if v_entries is not null then
        perform ledger.post(v_entries, p_at);
    end if;
end;
$$;

create or replace function surety.is_unattached(p_fact jsonb) returns boolean
language sql immutable parallel safe
begin atomic
    select coalesce(
        p_fact ->> 'kind' in ('payout', 'payout_failed')
        or p_fact -> 'data' ->> 'category' in (
            'payout', 'payout_reversal', 'bank_line', 'fee', 'tax', 'network_cost', 'risk_reserved_funds'
        ),
        false
    );
end;

create or replace function surety.unattached_entry(p_fact jsonb, p_rule text) returns ledger.entry
language sql immutable parallel safe
begin atomic
    select (
        p_fact ->> 'object_id', p_rule, null, null, (p_fact ->> 'provider') || '/' || (p_fact ->> 'account'),
        p_fact ->> 'currency', (p_fact ->> 'amount_minor')::bigint, (p_fact -> 'data' ->> 'fee')::bigint,
        (p_fact -> 'data' ->> 'net')::bigint, null, null, null, null, null
    )::ledger.entry;
end;

create or replace function surety.retry_parked(p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Facts that found no payment are tried again; after 15 minutes they are foreign, or a critical discrepancy when they
-- carry our environment's metadata. Foreign money is booked to suspense, else payouts would never tie.
declare
    v_now timestamptz := surety.time_now();
    v_found jsonb;
    v_given_up surety.parked_facts [];
    v_types text [] := '{}';
begin
    with due as (
        select k.* from surety.parked_facts as k where k.ended_at is null order by k.parked_at, k.id
        limit p_limit
        for update skip locked
    ),
    judged as (
        select d.*, surety.match_fact(
            null, d.provider, d.account, d.object_id, d.fact ->> 'intent', d.fact -> 'data' ->> 'source',
            d.fact ->> 'metadata_payment') is not null as is_found
        from due as d
    ),
    ended as (
        update surety.parked_facts as k
        set ended_at = v_now,
            ended_as = case
                when j.is_found then 'attached'
                when k.fact ->> 'metadata_environment' = (select e.id from surety.environment as e) then 'missing_here'
                else 'foreign'
            end
        from judged as j
        where k.id = j.id and (j.is_found or j.parked_at < v_now - interval '15 minutes')
        returning k.*
    )
    select
        jsonb_agg(e.fact) filter (where e.ended_as = 'attached'),
        array_agg((
            e.id, e.provider, e.account, e.livemode, e.object_id, e.kind, e.revision, e.fact, e.parked_at,
            e.ended_at, e.ended_as
        )::surety.parked_facts) filter (where e.ended_as <> 'attached')
    into v_found, v_given_up from ended as e;

    if v_found is not null then
        v_types := surety.record_facts(v_found, 'system:parked');
    end if;
    if v_given_up is not null then
        perform surety.open_discrepancy(
            case when g.kind in ('returned', 'dishonored', 'contested') then 'return_without_entry' else g.ended_as end,
            g.object_id || ':' || g.kind, null,
            format('%s %s belongs to no payment here', g.kind, g.object_id), g.fact, g.ended_as = 'missing_here', v_now)
        from unnest(v_given_up) as g;
        perform ledger.post(array_agg(surety.unattached_entry(
            g.fact, surety.money_rule(g.provider, 'foreign', false)) order by g.object_id), v_now)
        from unnest(v_given_up) as g where g.kind = 'money'
        having count(*) > 0;
    end if;
    return v_types;
end;
$$;
