-- The audit trail, and the tables that are append-only. surety.maintain_partitions protects their partitions.

create or replace function audit.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception '%.% is append-only: % is refused', tg_table_schema, tg_table_name, lower(tg_op)
        using errcode = 'SU003';
end;
$$;

comment on function audit.refuse_change() is
'Trigger of append-only tables: refuses update, delete and truncate with SU003.';

create or replace trigger entries_are_append_only before update or delete or truncate on audit.entries
for each statement execute function audit.refuse_change();

create or replace trigger steps_are_append_only before update or delete or truncate on surety.steps
for each statement execute function audit.refuse_change();

create or replace trigger fee_rates_are_append_only before update or delete or truncate on surety.fee_rates
for each statement execute function audit.refuse_change();

create or replace trigger fee_rate_withdrawals_are_append_only
before update or delete or truncate on surety.fee_rate_withdrawals
for each statement execute function audit.refuse_change();

create or replace trigger facts_are_append_only before update or delete or truncate on surety.facts
for each statement execute function audit.refuse_change();

create or replace trigger transfers_are_append_only before update or delete or truncate on ledger.transfers
for each statement execute function audit.refuse_change();

create or replace trigger postings_are_append_only before update or delete or truncate on ledger.postings
for each statement execute function audit.refuse_change();

create or replace trigger daily_balances_are_append_only before update or delete or truncate on ledger.daily_balances
for each statement execute function audit.refuse_change();

create or replace trigger closed_months_are_append_only before update or delete or truncate on ledger.closed_months
for each statement execute function audit.refuse_change();

create or replace trigger closed_balances_are_append_only before update or delete or truncate on ledger.closed_balances
for each statement execute function audit.refuse_change();

create or replace trigger events_are_append_only before update or delete or truncate on outbox.events
for each statement execute function audit.refuse_change();

create or replace function audit.write_entry(
    p_kind text, p_actor text, p_outcome text, p_reason text default null, p_payment_id text default null,
    p_merchant_id text default null, p_address text default null, p_request_id text default null,
    p_snapshot jsonb default '{}'
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    insert into audit.entries (
        id, at, kind, actor, outcome, reason, payment_id, merchant_id, address, request_id, snapshot
    )
    values (
        surety.new_id('aud', surety.time_now()), surety.time_now(), p_kind, p_actor, p_outcome, p_reason, p_payment_id,
        p_merchant_id, p_address, p_request_id,
        case when p_kind = 'operator' then p_snapshot || jsonb_build_object('database_user', session_user::text)
            else p_snapshot
        end
    );
end;

comment on function audit.write_entry(text, text, text, text, text, text, text, text, jsonb) is
'Writes one entry of the audit trail, at the current time. Functions that audit many rows insert them in a statement.
An operator''s entry also keeps the login of the database session, since its actor is what the caller says.';

create or replace function audit.write_entries(p_entries jsonb) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Entries of the other kinds are written by the functions whose actions they record; a worker cannot forge them.
declare
    v_now timestamptz := surety.time_now();
    v_kind text;
    v_first_payment text;
    v_last_payment text;
begin
    select
        min(e.kind) filter (where e.kind not in ('call', 'answer', 'system')),
        min(e.payment_id collate "C"), max(e.payment_id collate "C")
    into v_kind, v_first_payment, v_last_payment
    from jsonb_to_recordset(p_entries) as e (kind text, payment_id text);
    if v_kind is not null then
        raise exception 'entries of kind % are not written by workers', v_kind using errcode = 'SU008';
    end if;
    insert into audit.entries (
        id, at, kind, actor, address, request_id, payment_id, merchant_id, outcome, reason, duration_ms, snapshot
    )
    select
        surety.new_id('aud', v_now), v_now, e.kind, e.actor, e.address, e.request_id, e.payment_id,
        coalesce(e.merchant_id, p.merchant_id), e.outcome, e.reason, e.duration_ms, coalesce(e.snapshot, '{}')
    from jsonb_to_recordset(p_entries) as e (
        kind text, actor text, address text, request_id text, payment_id text, merchant_id text, outcome text,
        reason text, duration_ms numeric, snapshot jsonb
    )
    -- The bounds exclude partitions before the join begins.
    left join surety.payments as p on p.id = e.payment_id and p.id between v_first_payment and v_last_payment;
end;
$$;

comment on function audit.write_entries(jsonb) is
'Writes entries about provider calls and answers from an array of objects with the columns as keys. The merchant
defaults to that of the payment. Raises SU008 for a kind other than call, answer and system.';
