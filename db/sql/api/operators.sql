-- The operators' part of the API, with keys of their own. Every function takes the SHA-256 of the key and finds the
-- operator itself, so that no caller can name one. No row: the key has not the scope; api.explain_operator_denial says
-- why. surety.check_operator decides, for the command line as well.

create or replace function api.identify_operator(p_key_hash bytea, p_scope text, p_address text)
returns table (key_id text, operator text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        checked.key_id,
        checked.operator
    from surety.check_operator(p_key_hash, p_scope, coalesce(p_address, '')) as checked
    where checked.problem is null;
end;

comment on function api.identify_operator(bytea, text, text) is
'The operator with this key. No row: not an operator''s key, or it may not be used for the scope from the address.';

create or replace function api.explain_operator_denial(
    p_key_hash bytea, p_request_id text, p_address text, p_route text, p_is_audited boolean, p_scope text
) returns table (reason text, is_counted boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    reason := coalesce(
        (select c.problem from surety.check_operator(p_key_hash, p_scope, coalesce(p_address, '')) as c),
        (
            select
                coalesce(
                    api.find_key_problem(
                        k.revoked_at, k.expires_at, k.networks, array[p_scope], p_scope, p_address, surety.time_now()),
                    'forbidden')
            from surety.api_keys as k
            where k.hash = p_key_hash
        ),
        'unauthenticated');
    is_counted := p_is_audited and (
        select done.is_counted
        from api.audit_denial(p_key_hash, p_request_id, p_address, p_route, reason) as done
    );
    return next;
end;
$$;

comment on function api.explain_operator_denial(bytea, text, text, text, boolean, text) is
'Why a key may not do what an operator''s route needs: a reason of api.find_key_problem, forbidden for a merchant''s
key, unauthenticated for an unknown one. With p_is_audited, the denial is counted and audited as by api.audit_denial.';

create or replace function api.list_dead_letters(
    p_key_hash bytea, p_status text, p_handler text, p_error text, p_limit integer, p_starting_after text,
    p_address text default ''
) returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with who as (
        select identified.operator from api.identify_operator(p_key_hash, 'dead-letters:read', p_address) as identified
    ),

    found as (
        select letters.id, letters as letter
        from who
        cross join outbox.find_dead_letters(p_status, p_handler, p_error, p_starting_after, p_limit + 1) as letters
    )

    select
        who.operator,
        api.render_page(
            array(
                select shown.document
                from found cross join lateral outbox.show_dead_letter(found.letter) as shown
                order by found.id
            ),
            p_limit
        )
    from who;
end;

comment on function api.list_dead_letters(bytea, text, text, text, integer, text, text) is
'A page of dead letters, oldest first, by status, handler and a part of the last error.
No row: the key has not the scope.';

create or replace function api.get_dead_letter(p_key_hash bytea, p_id text, p_address text default '')
returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        (
            select shown.document::text
            from outbox.dead_letters cross join lateral outbox.show_dead_letter(dead_letters) as shown
            where dead_letters.id = p_id
        )
    from api.identify_operator(p_key_hash, 'dead-letters:read', p_address) as who;
end;

comment on function api.get_dead_letter(bytea, text, text) is
'A dead letter; body is null if there is none of that id. No row: the key has not the scope.';

create or replace function api.replay_dead_letter(
    p_key_hash bytea, p_id text, p_reason text, p_dry_run boolean, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'dead-letters:replay', p_address) as who
    cross join lateral outbox.replay_dead_letter(
        p_id, 'operator:' || who.operator, p_reason, p_dry_run, p_request_id, p_address
    ) as done;
end;

comment on function api.replay_dead_letter(bytea, text, text, boolean, text, text) is
'outbox.replay_dead_letter on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.discard_dead_letter(
    p_key_hash bytea, p_id text, p_reason text, p_dry_run boolean, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'dead-letters:discard', p_address) as who
    cross join lateral outbox.discard_dead_letter(
        p_id, 'operator:' || who.operator, p_reason, p_dry_run, p_request_id, p_address
    ) as done;
end;

comment on function api.discard_dead_letter(bytea, text, text, boolean, text, text) is
'outbox.discard_dead_letter on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.list_holds(
    p_key_hash bytea, p_status text, p_merchant_id text, p_limit integer, p_starting_after text,
    p_address text default ''
) returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        api.render_page(
            array(
                select shown.document
                from surety.find_holds(p_status, p_merchant_id, p_starting_after, p_limit + 1) as found
                cross join lateral surety.show_payment_hold(found) as shown
                order by found.payment_id
            ),
            p_limit
        )
    from api.identify_operator(p_key_hash, 'holds:read', p_address) as who;
end;

comment on function api.list_holds(bytea, text, text, integer, text, text) is
'A page of holds, oldest first, by status and merchant. No row: the key has not the scope.';

create or replace function api.get_hold(p_key_hash bytea, p_id text, p_address text default '')
returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        (
            select shown.document::text
            from surety.payment_holds cross join lateral surety.show_payment_hold(payment_holds) as shown
            where payment_holds.payment_id = p_id
        )
    from api.identify_operator(p_key_hash, 'holds:read', p_address) as who;
end;

comment on function api.get_hold(bytea, text, text) is
'The hold of a payment; body is null if it has none. No row: the key has not the scope.';

create or replace function api.decide_hold(
    p_key_hash bytea, p_id text, p_decision text, p_reason text, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'holds:decide', p_address) as who
    cross join lateral surety.decide_hold(
        p_id, p_decision, 'operator:' || who.operator, p_reason, p_request_id, p_address
    ) as done;
end;

comment on function api.decide_hold(bytea, text, text, text, text, text) is
'surety.decide_hold on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.get_status(p_key_hash bytea, p_address text default '')
returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        surety.read_status()::text
    from api.identify_operator(p_key_hash, 'status:read', p_address) as who;
end;

comment on function api.get_status(bytea, text) is
'The state of the service, as surety.read_status() reads it. No row: the key has not the scope.';
