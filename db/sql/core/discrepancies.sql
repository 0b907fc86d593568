-- Discrepancies (reconciliation breaks): contradictions that need an explanation.

create or replace function surety.open_discrepancy(
    p_kind text, p_subject text, p_payment_id text, p_detail text, p_data jsonb, p_is_critical boolean, p_at timestamptz
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
    select surety.new_id('dis', p_at), p_kind, p_subject, p_payment_id, p_detail, p_data, p_is_critical, p_at
    on conflict (kind, subject) do update
    set closed_at = null, closed_because = null, opened_at = excluded.opened_at, detail = excluded.detail
    where discrepancies.closed_because = 'it is recorded'
    returning discrepancies.id;
end;

comment on function surety.open_discrepancy(text, text, text, text, jsonb, boolean, timestamptz) is
'Opens a discrepancy of a kind about a subject and returns its id; null if it was recorded before, open or closed.
p_payment_id may be null. One that closed because its object was recorded opens again.';

create or replace function surety.close_recorded(p_facts jsonb, p_at timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    -- Locked in order, because another worker may record the same objects.
    with recorded as (
        select discrepancies.id
        from surety.discrepancies
        where
            discrepancies.kind = 'unrecorded' and discrepancies.closed_at is null
            and discrepancies.subject in (
                select f.fact ->> 'object_id' from jsonb_array_elements(p_facts) as f (fact)
            )
        order by discrepancies.subject
        for update
    )

    update surety.discrepancies
    set closed_at = p_at, closed_because = 'it is recorded'
    from recorded
    where discrepancies.id = recorded.id;
end;

comment on function surety.close_recorded(jsonb, timestamptz) is
'Closes the discrepancies of objects that could not be read or stored and that these facts are about.';
