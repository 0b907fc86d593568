-- Logins of analysts and auditors, which the command line creates by the rights of its own login.

create or replace function surety.audit_database_login(
    p_outcome text, p_login text, p_role text, p_bounds jsonb default '{}', p_actor text default session_user
) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select audit.write_entry(
        'operator', 'operator:' || p_actor, p_outcome,
        p_snapshot => jsonb_build_object('login', p_login, 'role', p_role) || p_bounds
    );
end;

comment on function surety.audit_database_login(text, text, text, jsonb, text) is
'Audits that a login of an analyst or auditor was granted, changed or revoked; p_bounds are its settings. The caller
changes the login in the same transaction.';
