-- API keys of merchants, and the keys of anyone that expire soon. Every change writes an audit entry.

create or replace function surety.require_room_for_key(p_merchant_id text, p_name text, p_scopes text[])
returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    -- One at a time for a merchant: two transactions that count at once would both find room.
    perform from surety.merchants as m where m.id = p_merchant_id for no key update;
    if 2 <= (
        select count(*) from surety.api_keys as k
        where k.merchant_id = p_merchant_id and k.name = p_name and k.scopes = p_scopes
            and k.revoked_at is null and (k.expires_at is null or k.expires_at > surety.time_now())
    ) then
        raise exception 'merchant % has two active keys named % with these scopes', p_merchant_id, p_name
            using errcode = 'SU010', hint = 'revoke one of them, or give the new key another name';
    end if;
end;
$$;

comment on function surety.require_room_for_key(text, text, text[]) is
'Raises SU010 if a merchant has two active keys of this name and these scopes: one and its successor are enough.';

create or replace function surety.add_api_key(
    p_merchant_id text, p_hash bytea, p_hint text, p_actor text default session_user, p_name text default 'default',
    p_scopes text[] default array['disputes:write', 'payments:write', 'read', 'refunds:write', 'webhooks:write'],
    p_networks cidr[] default '{}', p_expires_at timestamptz default null
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_id text := surety.new_id('key', v_now);
    v_scopes text[] := array(select distinct s.scope from unnest(p_scopes) as s (scope) order by s.scope);
begin
    perform surety.require_room_for_key(p_merchant_id, p_name, v_scopes);
    insert into surety.api_keys (
        id, merchant_id, name, scopes, networks, hash, hint, created_by, created_at, expires_at
    )
    values (v_id, p_merchant_id, p_name, v_scopes, p_networks, p_hash, p_hint, p_actor, v_now, p_expires_at);
    perform surety.audit_operator_action(
        p_actor, p_merchant_id, 'key created',
        jsonb_build_object(
            'key', v_id, 'hint', p_hint, 'name', p_name, 'scopes', v_scopes, 'networks', p_networks,
            'expires_at', surety.format_time(p_expires_at)));
    return v_id;
end;
$$;

comment on function surety.add_api_key(text, bytea, text, text, text, text[], cidr[], timestamptz) is
'Stores a merchant''s API key by its SHA-256 and the characters to show, and returns its id. Raises SU010 if the
merchant has two active keys of that name and these scopes.';

create or replace function surety.rotate_api_key(
    p_key_id text, p_hash bytea, p_hint text, p_overlap interval, p_actor text default session_user
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_id text := surety.new_id('key', v_now);
    v_old surety.api_keys;
begin
    select k.* into v_old from surety.api_keys as k where k.id = p_key_id;
    perform surety.require_room_for_key(v_old.merchant_id, v_old.name, v_old.scopes);
    -- The merchant's row is locked, so no other rotation changes the key meanwhile.
    select k.* into v_old from surety.api_keys as k
    where k.id = p_key_id and k.revoked_at is null and (k.expires_at is null or k.expires_at > v_now)
    for update;
    if not found then
        return null;
    end if;
    insert into surety.api_keys (
        id, merchant_id, name, scopes, networks, hash, hint, created_by, created_at, expires_at
    )
    values (
        v_id, v_old.merchant_id, v_old.name, v_old.scopes, v_old.networks, p_hash, p_hint, p_actor, v_now,
        v_now + (v_old.expires_at - v_old.created_at)
    );
    insert into surety.rate_limits (subject, requests_per_second, burst)
    select v_id, l.requests_per_second, l.burst from surety.rate_limits as l where l.subject = p_key_id;
    update surety.api_keys as k set expires_at = least(k.expires_at, v_now + p_overlap) where k.id = p_key_id;
    perform surety.audit_operator_action(
        p_actor, v_old.merchant_id, 'key rotated',
        jsonb_build_object(
            'key', p_key_id, 'hint', v_old.hint, 'successor', v_id, 'successor_hint', p_hint,
            'expires_at', surety.format_time(least(v_old.expires_at, v_now + p_overlap))));
    return v_id;
end;
$$;

comment on function surety.rotate_api_key(text, bytea, text, interval, text) is
'Stores a successor of an API key, with its name, scopes, networks and rate limit, and as long a life. The old key
expires after p_overlap at the latest. Returns the successor''s id; null for a key that is unknown, revoked or expired.
Raises SU010 if the key has an active successor.';

create or replace function surety.revoke_api_key(p_key_id text, p_actor text default session_user) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with revoked as (
        update surety.api_keys set revoked_at = surety.time_now()
        where api_keys.id = p_key_id and api_keys.revoked_at is null
        returning api_keys.id, api_keys.merchant_id, api_keys.hint
    ),

    audited as (
        select revoked.id
        from revoked, surety.audit_operator_action(
            p_actor, revoked.merchant_id, 'key revoked', jsonb_build_object('key', revoked.id, 'hint', revoked.hint)
        )
    )

    select (select count(*) > 0 from audited)
    from surety.api_keys cross join surety.await_standbys()
    where api_keys.id = p_key_id;
end;

comment on function surety.revoke_api_key(text, text) is
'Revokes a merchant''s API key. False if it was revoked, null for an unknown key.';

create or replace function surety.list_expiring_keys(p_within interval)
returns table (id text, merchant_id text, operator text, name text, hint text, seconds numeric)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        expiring.id,
        expiring.merchant_id,
        expiring.operator,
        expiring.name,
        expiring.hint,
        round(extract(epoch from expiring.expires_at - surety.time_now()), 3)
    from (
        select
            api_keys.id, api_keys.merchant_id, null as operator, api_keys.name, api_keys.hint, api_keys.expires_at
        from surety.api_keys
        where api_keys.revoked_at is null
            -- A key that its holder has replaced may expire.
            and not exists (
                select from surety.api_keys as successors
                where successors.merchant_id = api_keys.merchant_id and successors.name = api_keys.name
                    and successors.scopes = api_keys.scopes and successors.revoked_at is null
                    and successors.id > api_keys.id
                    and (successors.expires_at is null or successors.expires_at > api_keys.expires_at)
            )
        union all
        select
            operator_keys.id, null, operators.name, null, operator_keys.hint, operator_keys.expires_at
        from surety.operator_keys
        inner join surety.operators on operator_keys.operator_id = operators.id
        where operator_keys.revoked_at is null and operators.deactivated_at is null
            and not exists (
                select from surety.operator_keys as successors
                where successors.operator_id = operator_keys.operator_id and successors.role = operator_keys.role
                    and successors.revoked_at is null and successors.id > operator_keys.id
                    and (successors.expires_at is null or successors.expires_at > operator_keys.expires_at)
            )
    ) as expiring
    where expiring.expires_at > surety.time_now() and expiring.expires_at <= surety.time_now() + p_within
    order by expiring.expires_at;
end;

comment on function surety.list_expiring_keys(interval) is
'Keys that expire within the interval and have no successor of a longer life, the first to expire first. A merchant''s
key is succeeded by one of the same name and scopes, an operator''s by one of the same role. Of a merchant''s, operator
is null; of an operator''s, merchant_id and name are.';
