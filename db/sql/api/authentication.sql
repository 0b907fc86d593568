-- Authentication: the merchant of a key, and the reason why a key is refused.
--
-- No process caches a key. The functions that do the work look it up themselves, so a revocation applies to every
-- statement that begins after its commit.

create or replace function api.is_in_networks(p_address text, p_networks cidr[]) returns boolean
language sql stable
begin atomic
    -- A text that is no address is in no network, and is not cast.
    select
        coalesce(
            bool_or(
                network_subeq(
                    (case when p_address ~ '^[0-9A-Fa-f:.]{2,45}$' then p_address end)::inet, allowed.network
                )
            ),
            false
        )
    from unnest(p_networks) as allowed (network);
end;

comment on function api.is_in_networks(text, cidr[]) is 'Whether an address is in one of the networks.';

create or replace function api.find_key_problem(
    p_revoked_at timestamptz, p_expires_at timestamptz, p_networks cidr[], p_scopes text[], p_scope text,
    p_address text, p_now timestamptz
) returns text
language sql stable parallel safe
begin atomic
    select case
        when p_revoked_at is not null then 'key-revoked'
        when p_expires_at is not null and p_expires_at <= p_now then 'key-expired'
        when p_networks <> '{}' and not api.is_in_networks(p_address, p_networks) then 'network-not-allowed'
        when p_scope <> all(p_scopes) then 'scope-missing'
    end;
end;

comment on function api.find_key_problem(timestamptz, timestamptz, cidr[], text[], text, text, timestamptz) is
'Why a key may not be used for a scope from an address: key-revoked, key-expired, network-not-allowed or scope-missing;
null if it may. Without networks, every address is allowed. PostgreSQL inlines the expression.';

create or replace function api.identify_merchant(
    p_key_hash bytea, p_scope text default 'read', p_address text default ''
) returns table (key_id text, merchant_id text, is_suspended boolean, provider_account text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        api_keys.id,
        merchants.id,
        merchants.suspended_at is not null,
        merchants.provider_account
    from surety.api_keys
    inner join surety.merchants on api_keys.merchant_id = merchants.id
    where api_keys.hash = p_key_hash
        and api.find_key_problem(
            api_keys.revoked_at, api_keys.expires_at, api_keys.networks, api_keys.scopes, p_scope, p_address,
            surety.time_now()
        ) is null;
end;

comment on function api.identify_merchant(bytea, text, text) is
'The key with this SHA-256 and its merchant. No row: api.explain_denial has the reason.';

create or replace function api.explain_denial(p_key_hash bytea, p_scope text, p_address text) returns text
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(
        (
            select
                api.find_key_problem(
                    api_keys.revoked_at, api_keys.expires_at, api_keys.networks, api_keys.scopes, p_scope, p_address,
                    surety.time_now()
                )
            from surety.api_keys
            where api_keys.hash = p_key_hash
        ),
        'unauthenticated'
    );
end;

comment on function api.explain_denial(bytea, text, text) is
'Why api.identify_merchant has no row: a reason of api.find_key_problem, or unauthenticated for an unknown key.';

create or replace function api.audit_denial(
    p_key_hash bytea, p_request_id text, p_address text, p_route text, p_reason text, p_scope text default ''
) returns table (reason text, is_counted boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_actor text;
    v_merchant_id text;
begin
    reason := coalesce(p_reason, api.explain_denial(p_key_hash, p_scope, p_address));
    select known.actor, known.merchant_id into v_actor, v_merchant_id
    from (
        select 'key:' || k.id as actor, k.merchant_id from surety.api_keys as k where k.hash = p_key_hash
        union all
        select 'operator:' || o.name, null
        from surety.operator_keys as k join surety.operators as o on o.id = k.operator_id
        where k.hash = p_key_hash
    ) as known
    limit 1;
    -- Unknown keys cause no write here: the API counts them in memory and writes sums.
    is_counted := v_actor is not null;
    if is_counted and audit.count_refusal('denied', reason, v_actor) then
        perform audit.write_entry(
            'denied', v_actor, 'denied', reason, p_merchant_id => v_merchant_id, p_address => p_address,
            p_request_id => p_request_id, p_snapshot => jsonb_build_object('route', p_route)
        );
    end if;
    return next;
end;
$$;

comment on function api.audit_denial(bytea, text, text, text, text, text) is
'Counts the denial of a request with an existing key, a merchant''s or an operator''s, and audits the first hundred of
an hour. Nothing is counted for any other key. Without p_reason, it is that of api.explain_denial for p_scope.';

create or replace function api.note_key_uses(p_key_hashes bytea[]) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
begin
    -- Keys that another process is writing are skipped: it writes the same minute.
    update surety.api_keys as k set last_used_at = v_now
    where k.id in (
        select u.id from surety.api_keys as u
        where u.hash = any(p_key_hashes)
            and (u.last_used_at is null or u.last_used_at <= v_now - interval '1 minute')
        for no key update skip locked
    );
    update surety.operator_keys as k set last_used_at = v_now
    where k.id in (
        select u.id from surety.operator_keys as u
        where u.hash = any(p_key_hashes)
            and (u.last_used_at is null or u.last_used_at <= v_now - interval '1 minute')
        for no key update skip locked
    );
end;
$$;

comment on function api.note_key_uses(bytea[]) is
'Writes the current time as the last use of keys, unless their last one was written less than a minute ago.';
