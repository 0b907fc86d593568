-- Discrepancies: operators find, assign, snooze and resolve them. Every change is audited in its transaction.
--
-- A filter, as an object:
--   {"statuses": ["open", "snoozed", "closed"], "kind"?, "severity"?, "merchant"?, "payment"?, "assignee"?,
--    "opened_before"?: a time, "max_delta"?: minor units}
-- Several are locked in the order of kind and subject, in which they are opened.

create or replace function surety.discrepancy_status(p_discrepancy surety.discrepancies, p_at timestamptz) returns text
language sql immutable parallel safe
begin atomic
    select case
        when p_discrepancy.closed_at is not null then 'closed'
        when p_discrepancy.snoozed_until > p_at then 'snoozed'
        else 'open'
    end;
end;

comment on function surety.discrepancy_status(surety.discrepancies, timestamptz) is
'open, snoozed or closed. A snoozed one is open, and operators are not asked to look at it yet.';

create or replace function surety.discrepancy_matches(
    p_discrepancy surety.discrepancies, p_filter jsonb, p_at timestamptz
) returns boolean
language sql stable parallel safe
begin atomic
    select
        p_filter -> 'statuses' ? surety.discrepancy_status(p_discrepancy, p_at)
        and (p_filter ->> 'kind' is null or p_discrepancy.kind = p_filter ->> 'kind')
        and (p_filter ->> 'severity' is null or p_discrepancy.severity = p_filter ->> 'severity')
        and (p_filter ->> 'merchant' is null or p_discrepancy.merchant_id = p_filter ->> 'merchant')
        and (p_filter ->> 'payment' is null or p_discrepancy.payment_id = p_filter ->> 'payment')
        and (p_filter ->> 'assignee' is null or p_discrepancy.assignee = p_filter ->> 'assignee')
        and (
            p_filter ->> 'opened_before' is null
            or p_discrepancy.opened_at < (p_filter ->> 'opened_before')::timestamptz
        )
        and (
            p_filter ->> 'max_delta' is null
            -- A field that is no amount has no small difference.
            or not exists (
                select from jsonb_array_elements(p_discrepancy.fields) as f (field)
                where
                    f.field ->> 'delta_minor' is null
                    or abs((f.field ->> 'delta_minor')::numeric) > (p_filter ->> 'max_delta')::numeric
            )
        );
end;

comment on function surety.discrepancy_matches(surety.discrepancies, jsonb, timestamptz) is
'Whether a filter selects a discrepancy. max_delta: each of its fields is an amount that differs by at most so many
minor units. null where the discrepancy has no merchant, payment or assignee to compare.';

create or replace function surety.find_discrepancies(p_filter jsonb, p_after text, p_limit integer)
returns setof surety.discrepancies
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        discrepancies.id,
        discrepancies.kind,
        discrepancies.subject,
        discrepancies.occurrence,
        discrepancies.severity,
        discrepancies.payment_id,
        discrepancies.merchant_id,
        discrepancies.currency,
        discrepancies.detail,
        discrepancies.fields,
        discrepancies.source_here,
        discrepancies.source_there,
        discrepancies.data,
        discrepancies.first,
        discrepancies.opened_at,
        discrepancies.seen_again,
        discrepancies.seen_again_at,
        discrepancies.assignee,
        discrepancies.snoozed_until,
        discrepancies.note,
        discrepancies.closed_at,
        discrepancies.closed_as,
        discrepancies.closed_by,
        discrepancies.closed_because
    from surety.discrepancies
    where
        discrepancies.id > coalesce(p_after, '')
        and (p_filter -> 'statuses' ? 'closed' or discrepancies.closed_at is null)
        and surety.discrepancy_matches(discrepancies, p_filter, surety.time_now())
    order by discrepancies.id
    limit p_limit;
end;

comment on function surety.find_discrepancies(jsonb, text, integer) is
'Discrepancies that a filter selects, after the id p_after, the oldest first.';

create or replace function surety.show_discrepancy(p_discrepancy surety.discrepancies) returns table (document json)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select row_to_json(shown.*) from (
        select
            p_discrepancy.id as id,
            'discrepancy' as object,
            surety.discrepancy_status(p_discrepancy, surety.time_now()) as status,
            p_discrepancy.kind as kind,
            p_discrepancy.severity as severity,
            p_discrepancy.subject as subject,
            p_discrepancy.occurrence as occurrence,
            p_discrepancy.payment_id as payment,
            p_discrepancy.merchant_id as merchant,
            p_discrepancy.currency as currency,
            p_discrepancy.detail as detail,
            p_discrepancy.fields as fields,
            json_build_object(
                'here', p_discrepancy.source_here, 'there', p_discrepancy.source_there
            ) as sources,
            case
                when p_discrepancy.first is not null then json_build_object(
                    'detail', p_discrepancy.first -> 'detail',
                    'fields', p_discrepancy.first -> 'fields',
                    'sources', json_build_object(
                        'here', p_discrepancy.first -> 'source_here', 'there', p_discrepancy.first -> 'source_there'
                    )
                )
            end as first_seen,
            surety.format_time(p_discrepancy.opened_at) as opened_at,
            json_build_object(
                'count', p_discrepancy.seen_again, 'last_at', surety.format_time(p_discrepancy.seen_again_at)
            ) as seen_again,
            p_discrepancy.assignee as assignee,
            surety.format_time(p_discrepancy.snoozed_until) as snoozed_until,
            p_discrepancy.note as note,
            case
                when p_discrepancy.closed_at is not null then json_build_object(
                    'at', surety.format_time(p_discrepancy.closed_at), 'how', p_discrepancy.closed_as,
                    'by', p_discrepancy.closed_by, 'because', p_discrepancy.closed_because
                )
            end as closed
    ) as shown;
end;

comment on function surety.show_discrepancy(surety.discrepancies) is
'A discrepancy as the document that operators see: sources are the ids of the two records, first_seen the values at its
opening if a repetition changed them.';

create or replace function surety.audit_discrepancy_action(
    p_discrepancy surety.discrepancies, p_outcome text, p_actor text, p_reason text, p_request_id text, p_address text,
    p_change jsonb
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select audit.write_entry(
        'operator', p_actor, p_outcome, p_reason, p_discrepancy.payment_id, p_discrepancy.merchant_id, p_address,
        p_request_id,
        jsonb_build_object(
            'discrepancy', p_discrepancy.id, 'kind', p_discrepancy.kind, 'subject', p_discrepancy.subject,
            'occurrence', p_discrepancy.occurrence, 'fields', p_discrepancy.fields
        ) || p_change
    );
end;

comment on function surety.audit_discrepancy_action(
    surety.discrepancies, text, text, text, text, text, jsonb
) is
'Audits an operator''s change of a discrepancy, with its fields as the operator saw them, in the same transaction.';

create or replace function surety.assign_discrepancy(
    p_id text, p_assignee text, p_note text, p_actor text, p_request_id text default null, p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_found surety.discrepancies;
begin
    select d.* into v_found from surety.discrepancies as d where d.id = p_id for update;
    if not found then
        return query select 'not_found', 'there is no discrepancy ' || p_id;
    elsif v_found.closed_at is not null then
        return query select 'refused', 'it is closed';
    elsif p_assignee is not null and not exists (
        select from surety.operators as o where o.name = p_assignee and o.deactivated_at is null
    ) then
        return query select 'refused', 'there is no active operator ' || p_assignee;
    elsif v_found.assignee is not distinct from p_assignee and (p_note is null or p_note = v_found.note) then
        perform surety.await_standbys();
        return query select 'unchanged', coalesce('it is assigned to ' || p_assignee, 'it is assigned to none')
            || ' already';
    else
        update surety.discrepancies as d set assignee = p_assignee, note = coalesce(p_note, d.note) where d.id = p_id;
        perform surety.audit_discrepancy_action(
            v_found, 'discrepancy assigned', p_actor, p_note, p_request_id, p_address,
            jsonb_build_object('assignee', p_assignee, 'assignee_before', v_found.assignee));
        return query select 'assigned', coalesce('it is assigned to ' || p_assignee, 'it is assigned to none');
    end if;
end;
$$;

comment on function surety.assign_discrepancy(text, text, text, text, text, text) is
'Assigns a discrepancy to an active operator, or to none (null). A note replaces the present one; null keeps it.
Outcomes: assigned, unchanged, refused (it is closed, or there is no such operator), not_found.';

create or replace function surety.snooze_discrepancy(
    p_id text, p_until timestamptz, p_note text, p_actor text, p_request_id text default null,
    p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_found surety.discrepancies;
begin
    select d.* into v_found from surety.discrepancies as d where d.id = p_id for update;
    if not found then
        return query select 'not_found', 'there is no discrepancy ' || p_id;
    elsif v_found.closed_at is not null then
        return query select 'refused', 'it is closed';
    elsif p_until <= v_now or p_until > v_now + interval '90 days' then
        return query select 'refused', 'a snooze ends in the future, at most 90 days from now';
    elsif v_found.snoozed_until = p_until then
        perform surety.await_standbys();
        return query select 'unchanged', 'it is snoozed until ' || surety.format_time(p_until) || ' already';
    else
        update surety.discrepancies as d set snoozed_until = p_until, note = p_note where d.id = p_id;
        perform surety.audit_discrepancy_action(
            v_found, 'discrepancy snoozed', p_actor, p_note, p_request_id, p_address,
            jsonb_build_object('snoozed_until', surety.format_time(p_until)));
        return query select 'snoozed', 'it is snoozed until ' || surety.format_time(p_until);
    end if;
end;
$$;

comment on function surety.snooze_discrepancy(text, timestamptz, text, text, text, text) is
'Keeps a discrepancy out of the status report until a time within 90 days; other values end the snooze earlier. The note
says why. Outcomes: snoozed, unchanged, refused (it is closed, or the time is out of bounds), not_found.';

create or replace function surety.close_as_operator(
    p_discrepancies surety.discrepancies[], p_resolution text, p_reason text, p_actor text, p_request_id text,
    p_address text
) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    update surety.discrepancies as d
    set closed_at = surety.time_now(), closed_as = p_resolution, closed_by = p_actor, closed_because = p_reason,
        snoozed_until = null
    from unnest(p_discrepancies) as f
    where d.id = f.id;
    perform surety.audit_discrepancy_action(
        f::surety.discrepancies, 'discrepancy resolved', p_actor, p_reason, p_request_id, p_address,
        jsonb_build_object('resolution', p_resolution))
    from unnest(p_discrepancies) as f;
end;
$$;

comment on function surety.close_as_operator(surety.discrepancies[], text, text, text, text, text) is
'Closes discrepancies that are locked and open, on behalf of an operator, with an audit entry each.';

create or replace function surety.resolve_discrepancy(
    p_id text, p_resolution text, p_reason text, p_actor text, p_dry_run boolean default false,
    p_request_id text default null, p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_found surety.discrepancies;
begin
    select d.* into v_found from surety.discrepancies as d where d.id = p_id for update;
    if not found then
        return query select 'not_found', 'there is no discrepancy ' || p_id;
    elsif v_found.closed_at is not null then
        perform surety.await_standbys();
        return query select 'unchanged', format(
            'it was closed already as %s by %s: %s', v_found.closed_as, v_found.closed_by, v_found.closed_because);
    elsif p_dry_run then
        return query select 'would_resolve', 'it would be closed as ' || p_resolution;
    else
        perform surety.close_as_operator(array[v_found], p_resolution, p_reason, p_actor, p_request_id, p_address);
        return query select 'resolved', 'it is closed as ' || p_resolution;
    end if;
end;
$$;

comment on function surety.resolve_discrepancy(text, text, text, text, boolean, text, text) is
'Closes a discrepancy as explained, corrected, written_off or forced, for a reason that the audit trail keeps. Outcomes:
resolved, would_resolve (p_dry_run), unchanged (it was closed already, and keeps its first explanation), not_found.';

create or replace function surety.resolve_discrepancies(
    p_filter jsonb, p_expected integer, p_resolution text, p_reason text, p_actor text,
    p_dry_run boolean default false, p_request_id text default null, p_address text default null
) returns table (id text, outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_found surety.discrepancies [];
begin
    select array_agg(locked::surety.discrepancies order by locked.id) into v_found
    from (
        select d.* from surety.discrepancies as d
        where d.closed_at is null and surety.discrepancy_matches(d, p_filter, surety.time_now())
        order by d.kind, d.subject
        for update
    ) as locked;
    if p_expected is distinct from coalesce(cardinality(v_found), 0) and (p_expected is not null or not p_dry_run) then
        return query select null::text, 'refused', format(
            '%s match, not %s: none is resolved', coalesce(cardinality(v_found), 0), p_expected);
    elsif p_dry_run then
        return query select f.id, 'would_resolve', 'it would be closed as ' || p_resolution from unnest(v_found) as f;
    elsif v_found is not null then
        perform surety.close_as_operator(v_found, p_resolution, p_reason, p_actor, p_request_id, p_address);
        return query select f.id, 'resolved', 'it is closed as ' || p_resolution from unnest(v_found) as f;
    end if;
end;
$$;

comment on function surety.resolve_discrepancies(jsonb, integer, text, text, text, boolean, text, text) is
'Closes all open discrepancies that a filter selects, each with an audit entry, one row for each. If their number is not
p_expected, none is closed: one row with the outcome refused and no id. A dry run may leave p_expected out.';
