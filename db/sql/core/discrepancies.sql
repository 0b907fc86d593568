-- Discrepancies (reconciliation breaks): contradictions that need an explanation.

create or replace function surety.open_discrepancy(
    p_kind text, p_subject text, p_payment_id text, p_detail text, p_data jsonb, p_is_critical boolean, p_at timestamptz
) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into surety.discrepancies (id, kind, subject, payment_id, detail, data, is_critical, opened_at)
    select surety.new_id('dis', p_at), p_kind, p_subject, p_payment_id, p_detail, p_data, p_is_critical, p_at
    on conflict (kind, subject) do nothing
    returning discrepancies.id;
end;

comment on function surety.open_discrepancy(text, text, text, text, jsonb, boolean, timestamptz) is
'Opens a discrepancy of a kind about a subject and returns its id; null if it was recorded before, open or closed.
p_payment_id may be null.';
