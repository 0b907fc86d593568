-- Rate limits as data: set by operators, audited, and read with each lease of permits (api/permits.sql).

create or replace function surety.set_rate_limit(
    p_subject text, p_requests_per_second integer, p_burst integer, p_actor text default session_user
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_merchant_id text;
    v_before surety.rate_limits;
begin
    if p_subject not in ('keys', 'merchants', 'operator-keys') then
        select known.merchant_id into v_merchant_id
        from (
            select m.id, m.id as merchant_id from surety.merchants as m where m.id = p_subject
            union all
            select k.id, k.merchant_id from surety.api_keys as k where k.id = p_subject
            union all
            select k.id, null from surety.operator_keys as k where k.id = p_subject
        ) as known;
        if not found then
            return null;
        end if;
    end if;
    select l.* into v_before from surety.rate_limits as l where l.subject = p_subject for update;
    if p_requests_per_second is null then
        delete from surety.rate_limits as l where l.subject = p_subject and l.subject ~ '_';
    else
        insert into surety.rate_limits as l (subject, requests_per_second, burst)
        values (p_subject, p_requests_per_second, p_burst)
        on conflict (subject) do update set requests_per_second = excluded.requests_per_second, burst = excluded.burst
        where (l.requests_per_second, l.burst) <> (excluded.requests_per_second, excluded.burst);
    end if;
    if not found then
        return false;
    end if;
    perform surety.audit_operator_action(
        p_actor, v_merchant_id, 'rate limit changed',
        jsonb_build_object(
            'subject', p_subject, 'requests_per_second', p_requests_per_second, 'burst', p_burst,
            'before', case when v_before.subject is not null then jsonb_build_object(
                'requests_per_second', v_before.requests_per_second, 'burst', v_before.burst) end));
    return true;
end;
$$;

comment on function surety.set_rate_limit(text, integer, integer, text) is
'Sets the rate limit of a key or a merchant, or the default of keys, operator-keys or merchants. Zero requests per
second and a burst of zero are no limit; null is the default. False if nothing changed, null for an unknown key or
merchant.';

create or replace function surety.find_rate_limit(p_subject text, p_default text)
returns table (requests_per_second integer, burst integer, is_default boolean)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        rate_limits.requests_per_second,
        rate_limits.burst,
        rate_limits.subject = p_default
    from surety.rate_limits
    where rate_limits.subject in (p_subject, p_default)
    order by rate_limits.subject = p_default
    limit 1;
end;

comment on function surety.find_rate_limit(text, text) is
'The rate limit of a key or merchant: its own, or the default of keys, operator-keys or merchants.';

create or replace function surety.list_limited_merchants(p_limit integer default 5)
returns table (merchant_id text, name text, hour_count bigint, day_count bigint)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        merchants.id,
        merchants.name,
        coalesce(sum(refusals.count) filter (
            where refusals.hour = date_trunc('hour', surety.time_now(), 'UTC')
        ), 0)::bigint as hour_count,
        sum(refusals.count)::bigint as day_count
    from audit.refusals
    inner join surety.merchants on refusals.actor = merchants.id
    where refusals.kind = 'limited' and refusals.hour > surety.time_now() - interval '24 hours'
    group by merchants.id
    order by hour_count desc, day_count desc, merchants.id asc
    limit p_limit;
end;

comment on function surety.list_limited_merchants(integer) is
'The merchants whose requests were refused most often by a rate limit, in this hour and in the last 24 hours.';

create or replace function surety.delete_whole_bursts() returns integer
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with whole as (
        select rate_limit_uses.subject from surety.rate_limit_uses
        where rate_limit_uses.whole_at < surety.time_now()
        -- A row that a lease has locked is in use.
        for update skip locked
    ),

    deleted as (
        delete from surety.rate_limit_uses using whole
        where rate_limit_uses.subject = whole.subject
        returning rate_limit_uses.subject
    )

    select count(*)::integer from deleted;
end;

comment on function surety.delete_whole_bursts() is
'Deletes the rows of keys and merchants whose burst is whole, which mean the same as none; returns how many.';
