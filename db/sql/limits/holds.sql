-- Holds: accepted payments that wait for an operator. Their rows, and what merchants see of them.
--
--   open     surety.open_holds, in the transaction that accepts the payments
--   close    surety.close_holds: a decision (hold_decisions.sql), or the payment's end by other means (steps)
--
-- A payment on hold stands in `initiated`. Its event payment.initiated is skipped (surety.plan_payment_calls); only
-- payment.released, which the transaction of its release emits, leads to the provider.

create or replace function surety.hold_lifetime() returns interval
language sql immutable parallel safe
begin atomic
    select interval '7 days';
end;

comment on function surety.hold_lifetime() is
'How long a payment may be on hold. Without a decision it is canceled.';

create or replace function surety.show_hold(
    p_status text, p_opened_at timestamptz, p_expires_at timestamptz, p_closed_at timestamptz
) returns jsonb
language sql stable parallel safe
begin atomic
    select jsonb_build_object(
        'status', p_status,
        'opened_at', surety.format_time(p_opened_at),
        'expires_at', surety.format_time(p_expires_at),
        'closed_at', surety.format_time(p_closed_at)
    );
end;

comment on function surety.show_hold(text, timestamptz, timestamptz, timestamptz) is
'A hold as merchants see it, and as payments.flags keeps it. The status is open or the outcome.';

create or replace function surety.emit_hold_event(p_payment_id text, p_type text, p_at timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select outbox.emit_event(
        'payment', payments.id, p_type,
        jsonb_build_object(
            'payment_id', payments.id, 'state', payments.state, 'version', payments.version,
            'at', surety.format_time(p_at)
        ),
        payments.merchant_id, payments.version
    )
    from surety.payments
    where payments.id = p_payment_id;
end;

comment on function surety.emit_hold_event(text, text, timestamptz) is
'Emits payment.held or payment.released about a payment in the state initiated.';

create or replace function surety.open_holds(p_held jsonb, p_at timestamptz) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    insert into surety.payment_holds (payment_id, rule_id, detail, opened_at, expires_at)
    select h.key, h.value ->> 'rule', h.value - 'rule', p_at, p_at + surety.hold_lifetime()
    from jsonb_each(p_held) as h;
    perform surety.emit_hold_event(h.key, 'payment.held', p_at) from jsonb_object_keys(p_held) as h (key);
    perform audit.write_entry(
        'system', 'system', 'payment held', 'velocity rule ' || (h.value ->> 'rule'), p.id, p.merchant_id,
        p_snapshot => h.value)
    from jsonb_each(p_held) as h join surety.payments as p on p.id = h.key;
end;
$$;

comment on function surety.open_holds(jsonb, timestamptz) is
'Opens holds of payments that were just stored, with flags.hold: {payment id: {rule, ...detail}}.';

create or replace function surety.close_holds(
    p_payment_ids text[], p_outcome text, p_by text, p_reason text, p_at timestamptz
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    with closed as (
        update surety.payment_holds as h
        set closed_at = p_at, outcome = p_outcome, closed_by = p_by, reason = p_reason
        where h.payment_id = any(p_payment_ids) and h.closed_at is null
        returning h.payment_id, h.opened_at, h.expires_at
    )
    update surety.payments as p
    set updated_at = p_at,
        flags = p.flags || jsonb_build_object(
            'hold', surety.show_hold(p_outcome, c.opened_at, c.expires_at, p_at))
    from closed as c where p.id = c.payment_id;
end;
$$;

comment on function surety.close_holds(text[], text, text, text, timestamptz) is
'Closes the open holds of these payments, which the caller has locked.';

create or replace function surety.end_hold_of_step(
    p_payment_id text, p_to_state text, p_cause text, p_actor text, p_at timestamptz
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    case
        when p_to_state in ('failed', 'canceled') then
            perform surety.close_holds(array[p_payment_id], 'canceled', p_actor, null, p_at);
        when p_cause = 'command' then
            raise exception '% is on hold: it is not sent', p_payment_id
                using errcode = 'check_violation', constraint = 'held_payment_is_not_sent';
        else
            perform surety.close_holds(array[p_payment_id], 'overtaken', p_actor, null, p_at);
    end case;
end;
$$;

comment on function surety.end_hold_of_step(text, text, text, text, timestamptz) is
'Closes the open hold of a payment that leaves the state initiated otherwise than by a decision: canceled if it ended,
overtaken if the provider turns out to hold it, as after a restore. Raises held_payment_is_not_sent for the step of a
call that would send it.';
