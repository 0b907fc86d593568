-- Permits: each request of a key takes one from the key's limit and one from its merchant's. Processes lease permits
-- for many keys at once, so that no request needs a round trip of its own (app/web/rate_limits/leases.py).
--
-- The limits are GCRA (virtual scheduling): a subject may take permits while their time, at its rate, fits into its
-- burst. From rest, at most burst + rate * time permits are leased, by all processes together.

create or replace function surety.limits_of_keys(p_key_hashes bytea[], p_now timestamptz)
returns table (
    hash bytea, key_id text, merchant_id text, key_rate bigint, key_burst bigint, merchant_rate bigint,
    merchant_burst bigint
)
language sql stable
begin atomic
    select
        known.hash,
        known.id,
        known.merchant_id,
        nullif(coalesce(own.requests_per_second, defaults.requests_per_second), 0)::bigint,
        coalesce(own.burst, defaults.burst)::bigint,
        nullif(coalesce(of_merchant.requests_per_second, of_merchants.requests_per_second), 0)::bigint,
        coalesce(of_merchant.burst, of_merchants.burst)::bigint
    from (
        select api_keys.hash, api_keys.id, api_keys.merchant_id, 'keys' as defaults
        from surety.api_keys
        where api_keys.hash = any(p_key_hashes) and api_keys.revoked_at is null
            and (api_keys.expires_at is null or api_keys.expires_at > p_now)
        union all
        select operator_keys.hash, operator_keys.id, null, 'operator-keys'
        from surety.operator_keys
        where operator_keys.hash = any(p_key_hashes) and operator_keys.revoked_at is null
            and (operator_keys.expires_at is null or operator_keys.expires_at > p_now)
    ) as known
    inner join surety.rate_limits as defaults on known.defaults = defaults.subject
    left join surety.rate_limits as own on known.id = own.subject
    left join surety.rate_limits as of_merchant on known.merchant_id = of_merchant.subject
    left join surety.rate_limits as of_merchants
        on of_merchants.subject = 'merchants' and known.merchant_id is not null;
end;

comment on function surety.limits_of_keys(bytea[], timestamptz) is
'The keys with these SHA-256 that are neither revoked nor expired, their merchants, and the limits of both; a rate of
null is no limit. An operator''s key has no merchant. PostgreSQL inlines the expression.';

create or replace function surety.microseconds_of_use(
    p_whole_at timestamptz, p_rate bigint, p_burst bigint, p_now timestamptz
) returns bigint
language sql immutable
begin atomic
    -- At most the whole burst, also after its limit was changed or the clock stepped back.
    select greatest(
        0,
        least(
            ceil(extract(epoch from p_whole_at - p_now) * 1000000)::bigint,
            (p_burst * 1000000 + p_rate - 1) / p_rate
        )
    );
end;

comment on function surety.microseconds_of_use(timestamptz, bigint, bigint, timestamptz) is
'The time until a burst is whole again, in microseconds.';

create or replace function surety.seconds_to_permit(p_used bigint, p_rate bigint, p_burst bigint, p_taken bigint)
returns double precision
language sql immutable
begin atomic
    select greatest(0, p_used - (p_burst - 1 - p_taken) * 1000000 / p_rate) / 1000000.0::double precision;
end;

comment on function surety.seconds_to_permit(bigint, bigint, bigint, bigint) is
'The time until one more permit is free after p_taken were taken; p_used in microseconds.';

create or replace function surety.lock_uses(p_subjects text[], p_now timestamptz) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
    v_locked integer;
begin
    loop
        insert into surety.rate_limit_uses (subject, whole_at)
        select s.subject, p_now from unnest(p_subjects) as s (subject)
        where not exists (select from surety.rate_limit_uses as u where u.subject = s.subject)
        order by s.subject
        on conflict (subject) do nothing;
        perform from surety.rate_limit_uses as u where u.subject = any(p_subjects) order by u.subject for update;
        get diagnostics v_locked = row_count;
        -- surety.delete_whole_bursts may have deleted a row in between.
        exit when v_locked = cardinality(p_subjects);
    end loop;
end;
$$;

comment on function surety.lock_uses(text[], timestamptz) is
'Locks the rows of keys and merchants in surety.rate_limit_uses, in the order of the subjects; makes those missing.';

create or replace function api.lease_permits(p_requests jsonb)
returns table (
    n integer, key_id text, merchant_id text, granted bigint, key_rate bigint, key_burst bigint, key_left bigint,
    key_wait double precision, merchant_rate bigint, merchant_burst bigint, merchant_left bigint,
    merchant_wait double precision
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
    v_key_hashes bytea[];
    v_subjects text[];
begin
    -- Permits need no standby: a request that may run must not be refused because another one's commit waits.
    perform set_config('synchronous_commit', 'off', true);
    select array_agg(decode(r.key_hash, 'hex')) into v_key_hashes
    from jsonb_to_recordset(p_requests) as r (key_hash text);
    select array_agg(distinct s.subject) into v_subjects
    from surety.limits_of_keys(v_key_hashes, v_now) as l
    cross join lateral (values (l.key_id, l.key_rate), (l.merchant_id, l.merchant_rate)) as s (subject, rate)
    where s.rate is not null;
    if v_subjects is not null then
        perform surety.lock_uses(v_subjects, v_now);
    end if;
    return query
    with asked as (
        select
            r.n, r.wanted, r.held, l.*,
            surety.microseconds_of_use(k.whole_at, l.key_rate, l.key_burst, v_now) as key_used,
            surety.microseconds_of_use(m.whole_at, l.merchant_rate, l.merchant_burst, v_now) as merchant_used
        from jsonb_to_recordset(p_requests) as r (n integer, key_hash text, wanted bigint, held bigint)
        left join surety.limits_of_keys(v_key_hashes, v_now) as l on l.hash = decode(r.key_hash, 'hex')
        left join surety.rate_limit_uses as k on k.subject = l.key_id
        left join surety.rate_limit_uses as m on m.subject = l.merchant_id
    ),
    -- Null, which least() ignores, stands for all permits.
    free as (
        select
            a.*,
            case when a.key_rate is not null then
                greatest(0, (a.key_burst * 1000000 - a.key_used * a.key_rate) / 1000000) end as key_free,
            case when a.merchant_rate is not null then
                greatest(0, (a.merchant_burst * 1000000 - a.merchant_used * a.merchant_rate) / 1000000)
            end as merchant_free
        from asked as a
    ),
    claims as (
        select
            f.*,
            least(
                f.key_free,
                f.wanted + greatest(0, least(
                    (coalesce(least(f.key_rate, f.merchant_rate), 0) + 9) / 10 - f.held - f.wanted,
                    f.key_free - f.key_burst / 2 - f.wanted,
                    f.merchant_free - f.merchant_burst / 2 - f.wanted))
            ) as claim
        from free as f
    ),
    -- Keys of one merchant share its limit, those that want least first.
    shares as (
        select
            c.*,
            case when c.merchant_free is null then c.claim else
                least(c.claim, greatest(0, c.merchant_free - (sum(c.claim) over sharing - c.claim)))::bigint
            end as share
        from claims as c
        window sharing as (
            partition by c.merchant_id order by c.claim, c.n rows between unbounded preceding and current row
        )
    ),
    uses as (
        select s.subject, min(s.rate) as rate, min(s.used) as used, sum(s.share)::bigint as share
        from shares as h
        cross join lateral (
            values
            (h.key_id, h.key_rate, h.key_used, h.share), (h.merchant_id, h.merchant_rate, h.merchant_used, h.share)
        ) as s (subject, rate, used, share)
        where s.rate is not null
        group by s.subject
    ),
    taken as (
        update surety.rate_limit_uses as u
        set whole_at = v_now + (t.used + (t.share * 1000000 + t.rate - 1) / t.rate) * interval '1 microsecond'
        from uses as t
        -- A time beyond the whole burst is brought back, so that a change of limit acts from here on.
        where u.subject = t.subject and (t.share > 0 or u.whole_at > v_now + t.used * interval '1 microsecond')
    )
    select
        h.n, h.key_id, h.merchant_id, h.share,
        h.key_rate, h.key_burst, h.key_free - of_key.share,
        surety.seconds_to_permit(h.key_used, h.key_rate, h.key_burst, of_key.share),
        h.merchant_rate, h.merchant_burst, h.merchant_free - of_merchant.share,
        surety.seconds_to_permit(h.merchant_used, h.merchant_rate, h.merchant_burst, of_merchant.share)
    from shares as h
    left join uses as of_key on of_key.subject = h.key_id
    left join uses as of_merchant on of_merchant.subject = h.merchant_id;
end;
$$;

comment on function api.lease_permits(jsonb) is
'Leases permits for keys: [{"n", "key_hash" (hex), "wanted": the permits that requests need, "held": permits leased
before that are unused}]. A row per key: the permits granted, and for key and merchant the limit, the permits left, and
the seconds until the next one. No rate: no limit, and all is granted. No key_id: the key is unknown, revoked or
expired. While more than half of both bursts is left, a key gets the permits of a tenth of a second ahead of demand.';
