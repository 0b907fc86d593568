-- Discrepancies (reconciliation breaks): contradictions that need an explanation.
--
--   differing_amount, differing_value   one differing field with its two values
--   open_discrepancy                    opens one, or counts a repetition; every caller comes here
--   close_discrepancies                 closes those that a later fact resolves
--
-- One cause makes one discrepancy. A report repeats the cause if it has the same kind, subject and fields. So fields
-- hold what differs, and nothing that changes from report to report.

create or replace function surety.differing_value(p_field text, p_here text, p_there text) returns jsonb
language sql immutable parallel safe
begin atomic
    select jsonb_build_object('field', p_field, 'here', p_here, 'there', p_there, 'delta_minor', null);
end;

comment on function surety.differing_value(text, text, text) is
'One differing field of a discrepancy that is no amount: our value and the other side''s. Null where a side has none.';

create or replace function surety.differing_amount(p_field text, p_here bigint, p_there bigint) returns jsonb
language sql immutable parallel safe
begin atomic
    select jsonb_build_object(
        'field', p_field, 'here', p_here, 'there', p_there, 'delta_minor', coalesce(p_there, 0) - coalesce(p_here, 0)
    );
end;

comment on function surety.differing_amount(text, bigint, bigint) is
'One differing field of a discrepancy that is an amount, in minor units: ours, the other side''s, and the difference. A
side that has none counts as zero in the difference.';

create or replace function surety.open_discrepancy(
    p_kind text, p_subject text, p_severity text, p_detail text, p_fields jsonb, p_here text, p_there text,
    p_at timestamptz, p_payment_id text default null, p_merchant_id text default null, p_currency text default null,
    p_data jsonb default '{}'
) returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_last surety.discrepancies;
    v_id text;
begin
    loop
        -- The open one is the newest. Read without a lock: most repetitions write nothing.
        select d.* into v_last from surety.discrepancies as d
        where d.kind = p_kind and d.subject = p_subject
        order by d.occurrence desc limit 1;
        if found and v_last.closed_at is null then
            if v_last.fields = p_fields and v_last.severity = p_severity
                and p_at < coalesce(v_last.seen_again_at, v_last.opened_at) + interval '1 hour'
            then
                return null;
            end if;
            -- Other values are news, so they end a snooze.
            update surety.discrepancies as d
            set severity = p_severity, detail = p_detail, fields = p_fields, source_here = p_here,
                source_there = p_there, data = p_data, seen_again = d.seen_again + 1, seen_again_at = p_at,
                first = case
                    when d.first is null and d.fields <> p_fields then jsonb_build_object(
                        'detail', d.detail, 'fields', d.fields, 'source_here', d.source_here,
                        'source_there', d.source_there)
                    else d.first
                end,
                snoozed_until = case when d.fields = p_fields then d.snoozed_until end
            where d.id = v_last.id and d.closed_at is null;
            if found then
                return null;
            end if;
            -- It was closed meanwhile.
            continue;
        end if;
        -- An operator has closed the same cause.
        if exists (
            select from surety.discrepancies as d
            where d.kind = p_kind and d.subject = p_subject and d.closed_as <> 'arrived_late'
                and p_fields in (d.fields, d.first -> 'fields')
        ) then
            return null;
        end if;
        insert into surety.discrepancies (
            id, kind, subject, occurrence, severity, payment_id, merchant_id, currency, detail, fields, source_here,
            source_there, data, opened_at
        )
        select
            surety.new_id('dis', p_at), p_kind, p_subject, coalesce(v_last.occurrence, 0) + 1, p_severity, p_payment_id,
            coalesce(p_merchant_id, p.merchant_id), coalesce(p_currency, p.currency), p_detail, p_fields, p_here,
            p_there, p_data, p_at
        from (select p_payment_id as id) as given left join surety.payments as p on p.id = given.id
        -- Another worker may insert it at the same time: then it is a repetition.
        on conflict do nothing
        returning discrepancies.id into v_id;
        if found then
            return v_id;
        end if;
    end loop;
end;
$$;

comment on function surety.open_discrepancy(
    text, text, text, text, jsonb, text, text, timestamptz, text, text, text, jsonb
) is
'Opens a discrepancy of a kind about a subject and returns its id; null if none is opened. p_severity: notice, warning,
critical. p_fields: a JSON array of surety.differing_value and surety.differing_amount, at least one. p_here, p_there:
the ids of our record and of the other side''s; null where there is none. The merchant and the currency default to those
of the payment. A repetition while it is open keeps the newest values and counts as seen again, at most once an hour
unless a value differs. After its closing it is a new occurrence. One that an operator has closed with the same fields
is not opened again. In one transaction, open several in the order of kind and subject.';

create or replace function surety.close_discrepancies(
    p_kind text, p_subjects text[], p_because text, p_at timestamptz
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- In PL/pgSQL, because every fact comes here: its plan is kept.
begin
    update surety.discrepancies as d
    set closed_at = p_at, closed_as = 'arrived_late', closed_by = 'system', closed_because = p_because
    from (
        -- Locked in order, because another worker may close the same ones.
        select e.id from surety.discrepancies as e
        where e.kind = p_kind and e.subject = any(p_subjects) and e.closed_at is null
        order by e.subject
        for update
    ) as resolved
    where d.id = resolved.id;
end;
$$;

comment on function surety.close_discrepancies(text, text[], text, timestamptz) is
'Closes the open discrepancies of a kind about these subjects as arrived_late: a later fact has resolved them. If the
cause comes again, it is a new occurrence.';

create or replace function surety.close_recorded(p_facts jsonb, p_at timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_recorded text [];
    v_read text [];
begin
    -- A webhook may be about an object that is not there any more.
    select
        array_agg(f.fact ->> 'object_id'),
        array_agg(f.fact ->> 'object_id') filter (where f.fact ->> 'source' is distinct from 'webhook')
    into v_recorded, v_read
    from jsonb_array_elements(p_facts) as f (fact);
    perform surety.close_discrepancies('unrecorded', v_recorded, 'it is recorded', p_at);
    if v_read is not null then
        perform surety.close_discrepancies('missing_at_provider', v_read, 'it was read', p_at);
    end if;
end;
$$;

comment on function surety.close_recorded(jsonb, timestamptz) is
'Closes the discrepancies of objects that could not be read or stored, or that were missing, and that these facts are
about.';
