-- The ends of holds: an operator releases or refuses the payment, or it is canceled by time. A merchant's cancellation
-- ends the payment, and with it the hold (surety.project_steps).
--
-- Each locks the payment, then reads the hold: of two decisions, or a decision and a cancellation, the second finds
-- what the first one did.

create or replace function surety.show_payment_hold(p_hold surety.payment_holds) returns table (document json)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select row_to_json(shown.*) from (
        select
            p_hold.payment_id as id,
            'hold' as object,
            coalesce(p_hold.outcome, 'open') as status,
            p_hold.rule_id as rule,
            p_hold.detail as detail,
            (
                select json_build_object(
                    'id', payments.id,
                    'merchant', payments.merchant_id,
                    'state', payments.state,
                    'amount', payments.amount_minor,
                    'currency', payments.currency,
                    'text', surety.format_amount(payments.amount_minor, payments.currency)
                )
                from surety.payments
                where payments.id = p_hold.payment_id
            ) as payment,
            surety.format_time(p_hold.opened_at) as opened_at,
            surety.format_time(p_hold.expires_at) as expires_at,
            case
                when p_hold.closed_at is not null then json_build_object(
                    'at', surety.format_time(p_hold.closed_at), 'by', p_hold.closed_by, 'because', p_hold.reason
                )
            end as closed
    ) as shown;
end;

comment on function surety.show_payment_hold(surety.payment_holds) is
'A hold as the document that operators see; its id is the payment''s.';

create or replace function surety.find_holds(p_status text, p_merchant_id text, p_after text, p_limit integer)
returns setof surety.payment_holds
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        payment_holds.payment_id,
        payment_holds.rule_id,
        payment_holds.detail,
        payment_holds.opened_at,
        payment_holds.expires_at,
        payment_holds.closed_at,
        payment_holds.outcome,
        payment_holds.closed_by,
        payment_holds.reason
    from surety.payment_holds
    where
        payment_holds.payment_id > coalesce(p_after, '')
        and (p_status is null or coalesce(payment_holds.outcome, 'open') = p_status)
        and (p_status is distinct from 'open' or payment_holds.closed_at is null)
        and (
            p_merchant_id is null
            or exists (
                select from surety.payments
                where payments.id = payment_holds.payment_id and payments.merchant_id = p_merchant_id
            )
        )
    order by payment_holds.payment_id
    limit p_limit;
end;

comment on function surety.find_holds(text, text, text, integer) is
'Holds after the payment p_after, the oldest first. p_status: open, an outcome, or null for all.';

create or replace function surety.decide_hold(
    p_payment_id text, p_decision text, p_actor text, p_reason text, p_request_id text default null,
    p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_hold surety.payment_holds;
    v_payment surety.payments;
begin
    select p.* into v_payment from surety.payments as p where p.id = p_payment_id for update;
    select h.* into v_hold from surety.payment_holds as h where h.payment_id = p_payment_id;
    if not found then
        return query select 'not_found', 'no payment on hold has the id ' || p_payment_id;
        return;
    elsif v_hold.outcome = p_decision then
        return query select 'unchanged', 'it was ' || p_decision || ' already by ' || v_hold.closed_by;
        return;
    elsif v_hold.closed_at is not null then
        return query select 'ended', 'its hold has ended: ' || v_hold.outcome || ' by ' || v_hold.closed_by;
        return;
    end if;
    perform surety.close_holds(array[p_payment_id], p_decision, p_actor, p_reason, v_now);
    perform audit.write_entry(
        'operator', p_actor, 'payment ' || p_decision, p_reason, p_payment_id, v_payment.merchant_id, p_address,
        p_request_id, jsonb_build_object('rule', v_hold.rule_id));
    case p_decision
        when 'released' then
            perform surety.emit_hold_event(p_payment_id, 'payment.released', v_now);
            perform outbox.schedule_handlers(array['submit']);
            return query select 'released', 'it is sent to the provider';
        when 'refused' then
            update surety.payments as p
            set failure = jsonb_build_object(
                'code', 'hold_refused', 'message', 'The payment was refused in a review. Nothing was charged.')
            where p.id = p_payment_id;
            insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor, request_id)
            values (
                p_payment_id, v_payment.version + 1, v_payment.state, 'failed', 'refused', v_now, p_actor, p_request_id
            );
            return query select 'refused', 'it has ended as failed; nothing was sent';
    end case;
end;
$$;

comment on function surety.decide_hold(text, text, text, text, text, text) is
'Releases or refuses a payment on hold (p_decision: released, refused), for a reason that the audit trail keeps.
Outcomes: released; refused; unchanged (the same decision was made already); ended (its hold has ended otherwise);
not_found.';

create or replace function surety.expire_holds(p_actor text, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_ids text[] := array(
        select h.payment_id from surety.payment_holds as h
        where h.closed_at is null and h.expires_at <= v_now
        order by h.expires_at
        limit p_limit
    );
begin
    if v_ids = '{}' then
        return '{}';
    end if;
    perform from surety.payments as p where p.id = any(v_ids) order by p.id for update;
    -- Again behind the lock: an operator may have decided since.
    v_ids := array(
        select h.payment_id from surety.payment_holds as h where h.payment_id = any(v_ids) and h.closed_at is null
    );
    perform surety.close_holds(v_ids, 'expired', p_actor, null, v_now);
    update surety.payments as p
    set failure = jsonb_build_object(
        'code', 'hold_expired', 'message', 'The payment was on hold for too long. Nothing was charged.')
    where p.id = any(v_ids);
    insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor)
    select p.id, p.version + 1, p.state, 'canceled', 'overdue', v_now, p_actor
    from surety.payments as p where p.id = any(v_ids)
    order by p.id;
    return array['payment.canceled'];
end;
$$;

comment on function surety.expire_holds(text, integer) is
'Cancels payments whose hold has lasted for surety.hold_lifetime(). At most p_limit payments. Returns the types of the
events made.';

create or replace function surety.summarize_open_holds() returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_build_object(
        'open', count(*),
        'first', (array_agg(payment_holds.payment_id order by payment_holds.expires_at, payment_holds.payment_id))[1],
        'oldest_seconds', round(extract(epoch from surety.time_now() - min(payment_holds.opened_at)), 3),
        'expires_seconds', round(extract(epoch from min(payment_holds.expires_at) - surety.time_now()), 3)
    )
    from surety.payment_holds
    where payment_holds.closed_at is null;
end;

comment on function surety.summarize_open_holds() is
'The payments on hold: how many, the first, how long it has been on hold, and when it is canceled.';
