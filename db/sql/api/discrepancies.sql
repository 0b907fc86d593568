-- Discrepancies, as operators read and change them by the API. As in api/operators.sql: no row if the key has not the
-- scope.

create or replace function api.list_discrepancies(
    p_key_hash bytea, p_filter jsonb, p_limit integer, p_starting_after text, p_address text default ''
) returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        api.render_page(
            array(
                select shown.document
                from surety.find_discrepancies(p_filter, p_starting_after, p_limit + 1) as found
                cross join lateral surety.show_discrepancy(found) as shown
                order by found.id
            ),
            p_limit
        )
    from api.identify_operator(p_key_hash, 'discrepancies:read', p_address) as who;
end;

comment on function api.list_discrepancies(bytea, jsonb, integer, text, text) is
'A page of discrepancies that a filter of surety.find_discrepancies selects, oldest first. No row: the key has not the
scope.';

create or replace function api.get_discrepancy(p_key_hash bytea, p_id text, p_address text default '')
returns table (operator text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        (
            select shown.document::text
            from surety.discrepancies cross join lateral surety.show_discrepancy(discrepancies) as shown
            where discrepancies.id = p_id
        )
    from api.identify_operator(p_key_hash, 'discrepancies:read', p_address) as who;
end;

comment on function api.get_discrepancy(bytea, text, text) is
'A discrepancy; body is null if there is none of that id. No row: the key has not the scope.';

create or replace function api.assign_discrepancy(
    p_key_hash bytea, p_id text, p_assignee text, p_note text, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'discrepancies:assign', p_address) as who
    cross join lateral surety.assign_discrepancy(
        p_id, p_assignee, p_note, 'operator:' || who.operator, p_request_id, p_address
    ) as done;
end;

comment on function api.assign_discrepancy(bytea, text, text, text, text, text) is
'surety.assign_discrepancy on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.snooze_discrepancy(
    p_key_hash bytea, p_id text, p_until timestamptz, p_note text, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'discrepancies:resolve', p_address) as who
    cross join lateral surety.snooze_discrepancy(
        p_id, p_until, p_note, 'operator:' || who.operator, p_request_id, p_address
    ) as done;
end;

comment on function api.snooze_discrepancy(bytea, text, timestamptz, text, text, text) is
'surety.snooze_discrepancy on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.resolve_discrepancy(
    p_key_hash bytea, p_id text, p_resolution text, p_reason text, p_dry_run boolean, p_request_id text, p_address text
) returns table (operator text, outcome text, detail text)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        done.outcome,
        done.detail
    from api.identify_operator(p_key_hash, 'discrepancies:resolve', p_address) as who
    cross join lateral surety.resolve_discrepancy(
        p_id, p_resolution, p_reason, 'operator:' || who.operator, p_dry_run, p_request_id, p_address
    ) as done;
end;

comment on function api.resolve_discrepancy(bytea, text, text, text, boolean, text, text) is
'surety.resolve_discrepancy on behalf of the operator with this key. No row: the key has not the scope.';

create or replace function api.resolve_discrepancies(
    p_key_hash bytea, p_filter jsonb, p_expected integer, p_resolution text, p_reason text, p_dry_run boolean,
    p_request_id text, p_address text
) returns table (operator text, outcomes jsonb)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.operator,
        (
            select coalesce(jsonb_agg(to_jsonb(done) order by done.id), '[]')
            from surety.resolve_discrepancies(
                p_filter, p_expected, p_resolution, p_reason, 'operator:' || who.operator, p_dry_run, p_request_id,
                p_address
            ) as done
        )
    from api.identify_operator(p_key_hash, 'discrepancies:resolve', p_address) as who;
end;

comment on function api.resolve_discrepancies(bytea, jsonb, integer, text, text, boolean, text, text) is
'surety.resolve_discrepancies on behalf of the operator with this key: [{id, outcome, detail}]. No row: the key has not
the scope.';
