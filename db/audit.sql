-- The audit trail: what is written is never changed.

create or replace function audit.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception '%.% is append-only: % is refused', tg_table_schema, tg_table_name, lower(tg_op)
        using errcode = 'SU003';
end;
$$;

create or replace trigger entries_are_append_only before update or delete or truncate on audit.entries
for each statement execute function audit.refuse_change();
create or replace trigger steps_are_append_only before update or delete or truncate on surety.steps
for each statement execute function audit.refuse_change();
create or replace trigger facts_are_append_only before update or delete or truncate on surety.facts
for each statement execute function audit.refuse_change();
create or replace trigger transfers_are_append_only before update or delete or truncate on ledger.transfers
for each statement execute function audit.refuse_change();
create or replace trigger postings_are_append_only before update or delete or truncate on ledger.postings
for each statement execute function audit.refuse_change();
create or replace trigger events_are_append_only before update or delete or truncate on outbox.events
for each statement execute function audit.refuse_change();

create or replace function audit.record(p_entries jsonb) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    insert into audit.entries (
        id, at, kind, actor, address, request_id, payment_id, merchant_id, outcome, reason, duration_ms, snapshot
    )
    select
        surety.new_id('aud', coalesce(e.at, surety.time_now())),
        coalesce(e.at, surety.time_now()),
        e.kind,
        e.actor,
        e.address,
        e.request_id,
        e.payment_id,
        coalesce(e.merchant_id, payments.merchant_id),
        e.outcome,
        e.reason,
        e.duration_ms,
        coalesce(e.snapshot, '{}')
    from jsonb_to_recordset(p_entries) as e (
        at timestamptz, kind text, actor text, address text, request_id text, payment_id text, merchant_id text,
        outcome text, reason text, duration_ms numeric, snapshot jsonb
    )
    left join surety.payments on e.payment_id = payments.id;
end;
comment on function audit.record(jsonb) is
'Writes entries from an array of objects named as the columns; at defaults to now. Steps'' entries are the trigger''s.';
