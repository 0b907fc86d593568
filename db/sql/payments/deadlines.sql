-- Deadlines: payers who don't act, and evidence that merchants have not submitted yet.

create or replace function surety.emit_expired_actions(p_after interval, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_ids text[];
begin
    select array_agg(overdue.id) into v_ids
    from (
        -- Every unfinished payment has poll_at, so that the index on it finds them.
        select p.id
        from surety.payments as p
        join surety.steps as s on s.payment_id = p.id and s.version = p.version
        where p.poll_at is not null and p.state = 'requires_action' and s.at < v_now - p_after
            and not p.flags ? 'overdue_at'
        order by p.id
        limit p_limit
        for update of p skip locked
    ) as overdue;
    if v_ids is null then
        return '{}';
    end if;
    update surety.payments as p
    set flags = p.flags || jsonb_build_object('overdue_at', surety.format_time(v_now))
    where p.id = any(v_ids);
    perform outbox.emit_event(
        'payment', p.id, 'payment.action_overdue', jsonb_build_object('payment_id', p.id, 'reason', 'overdue'),
        null, p.version)
    from surety.payments as p where p.id = any(v_ids);
    return array['payment.action_overdue'];
end;
$$;

comment on function surety.emit_expired_actions(interval, integer) is
'Emits payment.action_overdue, once each, for payments whose payer has had to act for more than p_after; its handler
cancels them at the provider. At most p_limit payments. Returns the types of the events made.';

create or replace function surety.emit_evidence_reminders(p_before interval, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_due surety.disputes [];
begin
    with due as (
        select d.id from surety.disputes as d
        join surety.dispute_statuses as s on s.status = d.status and s.takes_evidence
        where d.reminded_at is null and d.evidence_due_at < v_now + p_before and d.submit_asked_at is null
        order by d.evidence_due_at
        limit p_limit
        for update of d skip locked
    ),
    reminded as (
        update surety.disputes as d set version = d.version + 1, reminded_at = v_now
        from due where d.id = due.id
        returning d
    )
    select array_agg(r.d) into v_due from reminded as r;
    if v_due is null then
        return '{}';
    end if;
    perform surety.emit_dispute_event(d, 'dispute.evidence_due', v_now) from unnest(v_due) as d;
    return array['dispute.evidence_due'];
end;
$$;

comment on function surety.emit_evidence_reminders(interval, integer) is
'Emits dispute.evidence_due, once each, for disputes whose evidence is due within p_before and was not submitted. At
most p_limit disputes. Returns the types of the events made.';
