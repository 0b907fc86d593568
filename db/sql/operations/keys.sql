-- API keys of merchants and keys of operators. Every change writes an audit entry.

create or replace function surety.add_api_key(
    p_merchant_id text, p_hash bytea, p_hint text, p_actor text default session_user
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with added as (
        insert into surety.api_keys (id, merchant_id, hash, hint, created_at)
        values (surety.new_id('key', surety.time_now()), p_merchant_id, p_hash, p_hint, surety.time_now())
        returning id
    )

    select added.id
    from added, surety.audit_operator_action(
        p_actor, p_merchant_id, 'key created', jsonb_build_object('key', added.id, 'hint', p_hint)
    );
end;

comment on function surety.add_api_key(text, bytea, text, text) is
'Stores a merchant''s API key by its SHA-256 and the characters to show, and returns its id.';

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

create or replace function surety.add_operator_key(
    p_operator text, p_hash bytea, p_hint text, p_actor text default session_user
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with added as (
        insert into surety.operator_keys (id, operator, hash, hint, created_at)
        values (surety.new_id('key', surety.time_now()), p_operator, p_hash, p_hint, surety.time_now())
        returning id
    )

    select added.id
    from added, surety.audit_operator_action(
        p_actor, null, 'operator key created',
        jsonb_build_object('key', added.id, 'operator', p_operator, 'hint', p_hint)
    );
end;

comment on function surety.add_operator_key(text, bytea, text, text) is
'Stores an operator''s key by its SHA-256 and the characters to show, and returns its id.';

create or replace function surety.revoke_operator_key(p_key_id text, p_actor text default session_user) returns boolean
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with revoked as (
        update surety.operator_keys set revoked_at = surety.time_now()
        where operator_keys.id = p_key_id and operator_keys.revoked_at is null
        returning operator_keys.id, operator_keys.operator, operator_keys.hint
    ),

    audited as (
        select revoked.id
        from revoked, surety.audit_operator_action(
            p_actor, null, 'operator key revoked',
            jsonb_build_object('key', revoked.id, 'operator', revoked.operator, 'hint', revoked.hint)
        )
    )

    select (select count(*) > 0 from audited)
    from surety.operator_keys cross join surety.await_standbys()
    where operator_keys.id = p_key_id;
end;

comment on function surety.revoke_operator_key(text, text) is
'Revokes an operator''s key. False if it was revoked, null for an unknown key.';
