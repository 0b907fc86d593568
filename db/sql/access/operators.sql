-- Operators: their accounts, roles and personal keys. Every change writes an audit entry.

create or replace function surety.check_operator(p_key_hash bytea, p_scope text, p_address text)
returns table (key_id text, operator text, problem text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        operator_keys.id,
        operators.name,
        api.find_key_problem(
            coalesce(operator_keys.revoked_at, operators.deactivated_at),
            operator_keys.expires_at,
            case when p_address is null then '{}' else operator_keys.networks end,
            array(
                select granted.scope
                from surety.role_scopes as granted
                inner join surety.role_scopes as kept on granted.scope = kept.scope
                where granted.role = operators.role and kept.role = operator_keys.role
            ),
            p_scope,
            p_address,
            surety.time_now()
        )
    from surety.operator_keys
    inner join surety.operators on operator_keys.operator_id = operators.id
    where operator_keys.hash = p_key_hash;
end;

comment on function surety.check_operator(bytea, text, text) is
'The operator with this key, and why it may not do what a scope stands for (api.find_key_problem); no problem: it may.
An operator that is deactivated has no valid key. Without an address, on the command line, networks are not compared. No
row: not an operator''s key. This is the one place that decides what an operator may do.';

create or replace function surety.authorize_operator(p_key_hash bytea, p_scope text, p_as text default null)
returns table (actor text, problem text, scope text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_operator text;
begin
    scope := p_scope;
    select c.operator, c.problem into v_operator, problem
    from surety.check_operator(p_key_hash, p_scope, null) as c;
    actor := v_operator;
    if v_operator is null then
        problem := 'unauthenticated';
    elsif problem is null and p_as is not null then
        select c.problem into problem from surety.check_operator(p_key_hash, 'operators:act-as', null) as c;
        if problem is not null then
            scope := 'operators:act-as';
        elsif not exists (
            select from surety.operators as o join surety.role_scopes as r on r.role = o.role
            where o.name = p_as and o.deactivated_at is null and r.scope = p_scope
        ) then
            problem := 'forbidden';
        else
            actor := p_as || ' (by ' || v_operator || ')';
        end if;
    end if;
    if problem is not null and v_operator is not null and audit.count_refusal(
        'denied', problem, 'operator:' || v_operator
    ) then
        perform audit.write_entry(
            'denied', 'operator:' || v_operator, 'denied', problem,
            p_snapshot => jsonb_strip_nulls(jsonb_build_object('scope', scope, 'as', p_as)));
    end if;
    return next;
end;
$$;

comment on function surety.authorize_operator(bytea, text, text) is
'The operator with this key, as the audit trail names it, for a command that needs a scope. p_as: another operator, for
whom an operator with operators:act-as acts; the other must have the scope too (else forbidden). A denial is counted and
audited like those of the API. unauthenticated: not an operator''s key.';

create or replace function surety.has_usable_admin() returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select count(*) > 0
    from surety.operators
    inner join surety.operator_keys on operators.id = operator_keys.operator_id
    where operators.role = 'admin' and operator_keys.role = 'admin' and operators.deactivated_at is null
        and operator_keys.revoked_at is null
        and (operator_keys.expires_at is null or operator_keys.expires_at > surety.time_now());
end;

comment on function surety.has_usable_admin() is
'Whether an active admin has a valid key. Without one, access to the owner''s login may make one.';

create or replace function surety.lesser_role(p_role text, p_other text) returns text
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select operator_roles.role from surety.operator_roles
    where operator_roles.role in (p_role, p_other)
    order by operator_roles.position limit 1;
end;

comment on function surety.lesser_role(text, text) is
'The role that stands first in surety.operator_roles; null for unknown roles.';

create or replace function surety.add_operator_key(
    p_operator text, p_hash bytea, p_hint text, p_actor text default session_user, p_role text default null,
    p_networks cidr[] default '{}', p_expires_at timestamptz default null
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_id text := surety.new_id('key', v_now);
    v_operator surety.operators;
    v_role text;
begin
    select o.* into v_operator from surety.operators as o
    where o.name = p_operator and o.deactivated_at is null for share;
    if not found then
        return null;
    end if;
    v_role := coalesce(p_role, v_operator.role);
    if surety.lesser_role(v_role, v_operator.role) <> v_role then
        raise exception 'operator % has the role %, which is less than %', p_operator, v_operator.role, v_role
            using errcode = 'SU011';
    end if;
    insert into surety.operator_keys (
        id, operator_id, role, networks, hash, hint, created_by, created_at, expires_at
    )
    values (v_id, v_operator.id, v_role, p_networks, p_hash, p_hint, p_actor, v_now, p_expires_at);
    perform surety.audit_operator_action(
        p_actor, null, 'operator key created',
        jsonb_build_object('key', v_id, 'operator', p_operator, 'hint', p_hint, 'role', v_role));
    return v_id;
end;
$$;

comment on function surety.add_operator_key(text, bytea, text, text, text, cidr[], timestamptz) is
'Stores an operator''s key by its SHA-256 and the characters to show, and returns its id; null if there is no active
operator of that name. p_role: the operator''s role or a lesser one. Raises SU011 for a greater one.';

create or replace function surety.add_operator(
    p_name text, p_email text, p_role text, p_hash bytea, p_hint text, p_actor text default session_user
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_id text := surety.new_id('opr', surety.time_now());
begin
    insert into surety.operators (id, name, email, role, created_by, created_at)
    values (v_id, p_name, surety.fold_email(p_email), p_role, p_actor, surety.time_now());
    perform surety.audit_operator_action(
        p_actor, null, 'operator added',
        jsonb_build_object('id', v_id, 'operator', p_name, 'email', surety.fold_email(p_email), 'role', p_role));
    perform surety.add_operator_key(p_name, p_hash, p_hint, p_actor);
    return v_id;
end;
$$;

comment on function surety.add_operator(text, text, text, bytea, text, text) is
'Adds an operator with a first key, by its SHA-256 and the characters to show; returns the operator''s id.';

create or replace function surety.add_first_admin(
    p_name text, p_email text, p_hash bytea, p_hint text, p_actor text
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    lock table surety.operators in share row exclusive mode;
    if surety.has_usable_admin() then
        return null;
    end if;
    if exists (select from surety.operators as o where o.name = p_name and o.role = 'admin') then
        -- Keys that were refused since the deactivation stay refused, except the new one.
        perform surety.revoke_operator_key(k.id, p_actor)
        from surety.operator_keys as k join surety.operators as o on o.id = k.operator_id
        where o.name = p_name and o.deactivated_at is not null and k.revoked_at is null;
        perform surety.set_operator(p_name, null, null, true, p_actor);
        return surety.add_operator_key(p_name, p_hash, p_hint, p_actor);
    end if;
    return surety.add_operator(p_name, p_email, 'admin', p_hash, p_hint, p_actor);
end;
$$;

comment on function surety.add_first_admin(text, text, bytea, text, text) is
'Adds an admin with a key while no active admin has a valid one; an admin of that name gets a new key,
and is active again. If it was deactivated, its old keys are revoked. Null, and nothing is added, otherwise.';

create or replace function surety.set_operator(
    p_name text, p_email text, p_role text, p_is_active boolean, p_actor text default session_user
) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update surety.operators
        set
            email = coalesce(surety.fold_email(p_email), operators.email),
            role = coalesce(p_role, operators.role),
            deactivated_at = case
                when p_is_active then null
                when not p_is_active then coalesce(operators.deactivated_at, surety.time_now())
                else operators.deactivated_at
            end
        where operators.name = p_name and (
            surety.fold_email(p_email) <> operators.email or p_role <> operators.role
            or p_is_active <> (operators.deactivated_at is null)
        )
        returning operators.id, operators.email, operators.role, operators.deactivated_at is null as is_active
    ),

    audited as (
        select changed.id
        from changed, surety.audit_operator_action(
            p_actor, null, 'operator changed',
            jsonb_build_object(
                'id', changed.id, 'operator', p_name, 'email', changed.email, 'role', changed.role,
                'is_active', changed.is_active
            )
        )
    )

    select (select count(*) > 0 from audited)
    from surety.operators cross join surety.await_standbys()
    where operators.name = p_name;
end;

comment on function surety.set_operator(text, text, text, boolean, text) is
'Changes an operator''s e-mail address, role or whether it is active; null keeps each. False if nothing changed, null
for an unknown name. Keys of an operator that is not active are refused.';

create or replace function surety.revoke_operator_key(p_key_id text, p_actor text default session_user) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with revoked as (
        update surety.operator_keys set revoked_at = surety.time_now()
        where operator_keys.id = p_key_id and operator_keys.revoked_at is null
        returning operator_keys.id, operator_keys.operator_id, operator_keys.hint
    ),

    audited as (
        select revoked.id
        from revoked
        inner join surety.operators on revoked.operator_id = operators.id
        cross join surety.audit_operator_action(
            p_actor, null, 'operator key revoked',
            jsonb_build_object('key', revoked.id, 'operator', operators.name, 'hint', revoked.hint)
        )
    )

    select (select count(*) > 0 from audited)
    from surety.operator_keys cross join surety.await_standbys()
    where operator_keys.id = p_key_id;
end;

comment on function surety.revoke_operator_key(text, text) is
'Revokes an operator''s key. False if it was revoked, null for an unknown key.';

create or replace function surety.rotate_operator_key(
    p_key_id text, p_hash bytea, p_hint text, p_overlap interval, p_actor text default session_user
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_id text := surety.new_id('key', v_now);
    v_old surety.operator_keys;
    v_operator surety.operators;
begin
    select o.* into v_operator
    from surety.operator_keys as k join surety.operators as o on o.id = k.operator_id
    where k.id = p_key_id and o.deactivated_at is null
    for update of o;
    -- The operator's row is locked, so no other rotation changes the key meanwhile.
    select k.* into v_old from surety.operator_keys as k
    where k.id = p_key_id and k.revoked_at is null and (k.expires_at is null or k.expires_at > v_now)
    for update;
    if v_operator.id is null or not found then
        return null;
    end if;
    insert into surety.operator_keys (
        id, operator_id, role, networks, hash, hint, created_by, created_at, expires_at
    )
    values (
        v_id, v_old.operator_id, surety.lesser_role(v_old.role, v_operator.role), v_old.networks, p_hash, p_hint,
        p_actor, v_now, v_now + (v_old.expires_at - v_old.created_at)
    );
    insert into surety.rate_limits (subject, requests_per_second, burst)
    select v_id, l.requests_per_second, l.burst from surety.rate_limits as l where l.subject = p_key_id;
    update surety.operator_keys as k set expires_at = least(k.expires_at, v_now + p_overlap) where k.id = p_key_id;
    perform surety.audit_operator_action(
        p_actor, null, 'operator key rotated',
        jsonb_build_object(
            'key', p_key_id, 'operator', v_operator.name, 'hint', v_old.hint, 'successor', v_id,
            'successor_hint', p_hint, 'expires_at', surety.format_time(least(v_old.expires_at, v_now + p_overlap))));
    return v_id;
end;
$$;

comment on function surety.rotate_operator_key(text, bytea, text, interval, text) is
'Stores a successor of an operator''s key, with its networks and rate limit, as long a life, and its role, or the
operator''s if that is less. The old key expires after p_overlap at the latest. Returns the successor''s id;
null for a key that is unknown, revoked or expired, or of an operator that is deactivated.';
