-- Dead letters, by operators: show, replay, discard. Each action needs a reason, which the audit trail keeps. Repeating
-- an action changes nothing more.

create or replace function outbox.discard_effect(p_letter outbox.dead_letters)
returns table (verdict text, detail text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with subject as (
        select
            payments.id,
            payments.state,
            payments.provider_id,
            calls.first_sent_at,
            calls.last_sent_at,
            calls.status,
            states.is_final or payments.captured_minor > 0 as has_ended,
            -- A refused request created nothing at the provider, and would be refused again.
            calls.payment_id is null or calls.refused_through = calls.sends
            or coalesce(calls.status in (400, 402, 404), false) as is_undone,
            refunds.state = 'pending' and refunds.provider_id is null as is_refund_open,
            asked.revision is not null as is_capture_open
        from surety.payments
        inner join surety.states on payments.state = states.state
        left join surety.refunds on payments.id = refunds.payment_id and refunds.id = p_letter.payload ->> 'refund_id'
        left join lateral surety.pending_capture(payments.id) as asked on p_letter.handler = 'capture'
        left join surety.calls
            on payments.id = calls.payment_id
            and calls.operation = case p_letter.handler
                when 'submit' then 'create'
                when 'refund' then 'refund:' || (p_letter.payload ->> 'refund_id')
                else p_letter.handler
            end
        where payments.id = p_letter.payment_id
    ),

    judged as (
        select
            asked.letter_id,
            subject.*,
            case
                when
                    subject.id is null
                    or p_letter.handler in (
                        'expect_settlement', 'meet_settlement', 'apply_webhooks', 'evidence', 'update_customer',
                        'save_method', 'detach_method', 'seal_secret'
                    )
                    then 'forget'
                when p_letter.type = 'payment.orphan_found' then 'forget'
                when p_letter.handler = 'refund' and subject.is_refund_open is not true then 'forget'
                when p_letter.handler = 'capture' and not (subject.state = 'processing' and subject.is_capture_open)
                    then 'forget'
                when p_letter.handler in ('refund', 'capture') and subject.is_undone then 'fail'
                when p_letter.handler in ('submit', 'confirm', 'cancel') and subject.has_ended then 'forget'
                when p_letter.handler = 'submit' and subject.state = 'initiated' then 'fail'
                when p_letter.handler = 'submit' and subject.state = 'submitting' and subject.is_undone then 'fail'
                when p_letter.handler = 'submit' and subject.state <> 'submitting' then 'forget'
                when p_letter.handler = 'confirm' and subject.state <> 'provider_submitted' then 'forget'
                when p_letter.handler = 'confirm' and subject.is_undone then 'cancel'
                else 'refuse'
            end as verdict
        from (values (p_letter.id)) as asked (letter_id)
        left join subject on true
    )

    select
        judged.verdict,
        case judged.verdict
            when 'fail' then
                case p_letter.handler
                    when 'refund' then 'ends the refund as failed, gives its amount back to the merchant'
                    when 'capture' then 'ends the capture as refused, keeps the authorization'
                    else 'ends the payment as failed'
                end
                || ', notifies the merchant, keeps the record: '
                || case
                    when judged.first_sent_at is null then 'nothing was sent'
                    else 'the provider refused to do it (' || judged.status || ')'
                end
            when 'cancel' then
                'asks the provider to cancel ' || judged.provider_id
                || ', which was never confirmed; the payment ends when it has answered'
            when 'forget' then
                'closes the letter, keeps the record'
                || coalesce('; the payment stays ' || judged.state, '')
                || case
                    when p_letter.handler = 'expect_settlement' then ', and a missing settlement opens no discrepancy'
                    when p_letter.handler = 'save_method' then ', and the payment method is not saved'
                    when p_letter.handler = 'detach_method'
                        then ', and the provider keeps the payment method, which can''t be charged here'
                    when p_letter.handler = 'update_customer'
                        then ', and the provider gets the customer''s data with the next change'
                    when p_letter.handler = 'evidence' then ', and the evidence is open again for its merchant'
                    when p_letter.type = 'payment.orphan_found'
                        then ', and ' || (p_letter.payload ->> 'object_id') || ', which was never confirmed, stays'
                    else ''
                end
            when 'refuse' then
                'is refused: '
                || case p_letter.handler
                    when 'refund' then 'the provider may have made the refund'
                    else 'the provider may hold a charge'
                end
                || coalesce(
                    ', because the outcome of the ' || p_letter.handler
                    || ' sent at ' || surety.format_time(judged.last_sent_at)
                    || ' is unknown',
                    ''
                ) || '; a replay asks it'
        end
    from judged;
end;

comment on function outbox.discard_effect(outbox.dead_letters) is
'The effect of a discard, judged by the known facts.
fail: nothing was sent, or the provider refused it; the payment or refund ends as failed, a capture as refused.
cancel: the provider holds an intent that was never confirmed; it is canceled.
forget: the event has nothing left to do, or affects nothing outside; only the letter is closed.
refuse: the provider may hold a charge; a replay reads it first.';

create or replace function outbox.describe_replay(p_handler text) returns text
language sql immutable set search_path = pg_catalog, pg_temp
begin atomic
    select case p_handler
        when 'submit' then 'creates the intent under the same key, or looks for it first: at most one will exist'
        when 'confirm' then 'reads the intent first, and confirms it only if it is not confirmed'
        when 'cancel' then 'reads the intent first, and cancels it only if it has not ended'
        when 'capture' then 'reads the intent first, and captures it only if its amount is still authorized'
        when 'refund' then 'looks for the refund among those of the payment first: at most one will exist'
        when 'evidence' then 'sends all evidence again, which the provider accepts as an update'
        when 'update_customer' then 'passes the customer''s present data on'
        when 'save_method' then 'reads the payment method at the provider again, and saves it once'
        when 'detach_method' then 'reads the payment method first, and detaches it only if it is attached'
        when 'seal_secret' then 'reads the client secret, if the merchant''s request still waits for it'
        when 'apply_webhooks' then 'reads the webhook again; facts that are known change nothing'
        when 'expect_settlement' then 'opens the expected settlement, unless it is open'
        when 'meet_settlement' then 'closes the expected settlement, unless it is closed'
        else 'gives the event to its handler again, which reads the object before it sends'
    end;
end;

comment on function outbox.describe_replay(text) is
'The effect of a replay by this handler, as a sentence for operators.';

create or replace function outbox.show_dead_letter(p_letter outbox.dead_letters) returns table (document json)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select row_to_json(shown.*) from (
        select
            p_letter.id as id,
            'dead_letter' as object,
            coalesce(p_letter.closed_as, 'open') as status,
            p_letter.handler as handler,
            json_build_object('id', p_letter.event_id, 'type', p_letter.type) as event,
            p_letter.reason as reason,
            p_letter.attempts as attempts,
            surety.format_time(p_letter.died_at) as died_at,
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
                where payments.id = p_letter.payment_id
            ) as payment,
            (
                select json_build_object(
                    'name', payments.provider,
                    'id', payments.provider_id,
                    'holds', case
                        when payments.provider_id is not null then 'object'
                        when created.payment_id is null or created.status in (400, 402, 404) then 'nothing'
                        else 'unknown'
                    end,
                    'as_of', surety.format_time(greatest(created.answered_at, heard.at))
                )
                from surety.payments
                left join surety.calls as created
                    on payments.id = created.payment_id and created.operation = 'create'
                left join lateral (
                    select max(facts.recorded_at) as at
                    from surety.facts
                    where facts.payment_id = payments.id
                ) as heard on true
                where payments.id = p_letter.payment_id
            ) as provider,
            case when p_letter.closed_at is null then outbox.describe_replay(p_letter.handler) end as on_replay,
            (
                select json_build_object('verdict', judged.verdict, 'detail', judged.detail)
                from outbox.discard_effect(p_letter) as judged
                where p_letter.closed_at is null
            ) as on_discard,
            case
                when p_letter.closed_at is not null then json_build_object(
                    'at', surety.format_time(p_letter.closed_at),
                    'by', p_letter.closed_by,
                    'because', p_letter.closed_because
                )
            end as closed
    ) as shown;
end;

comment on function outbox.show_dead_letter(outbox.dead_letters) is
'A dead letter as the document that operators see. provider is its last known state there, as of as_of.';

create or replace function outbox.find_dead_letters(
    p_status text, p_handler text, p_error text, p_after text, p_limit integer
) returns setof outbox.dead_letters
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        dead_letters.id,
        dead_letters.handler,
        dead_letters.event_id,
        dead_letters.type,
        dead_letters.payment_id,
        dead_letters.payload,
        dead_letters.attempts,
        dead_letters.reason,
        dead_letters.died_at,
        dead_letters.closed_at,
        dead_letters.closed_as,
        dead_letters.closed_by,
        dead_letters.closed_because
    from outbox.dead_letters
    where
        dead_letters.id > coalesce(p_after, '')
        and (p_status is null or coalesce(dead_letters.closed_as, 'open') = p_status)
        and (p_status is distinct from 'open' or dead_letters.closed_at is null)
        and (p_handler is null or dead_letters.handler = p_handler)
        and (
            p_error is null
            or position(p_error in coalesce(dead_letters.attempts -> -1 ->> 'error', dead_letters.reason)) > 0
        )
    order by dead_letters.id
    limit p_limit;
end;

comment on function outbox.find_dead_letters(text, text, text, text, integer) is
'Dead letters after the id p_after, the oldest first. p_status: open, replayed, discarded, resolved, or null for all.
p_error: a text that the last error contains.';

create or replace function outbox.audit_dead_letter_action(
    p_letter outbox.dead_letters, p_outcome text, p_actor text, p_reason text, p_request_id text, p_address text
) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select audit.write_entry(
        'operator', p_actor, p_outcome, p_reason, p_letter.payment_id,
        (select payments.merchant_id from surety.payments where payments.id = p_letter.payment_id),
        p_address, p_request_id,
        jsonb_build_object('dead_letter', p_letter.id, 'handler', p_letter.handler, 'event', p_letter.event_id)
    );
end;

comment on function outbox.audit_dead_letter_action(outbox.dead_letters, text, text, text, text, text) is
'Audits a replay or a discard, in the transaction of that action.';

create or replace function outbox.replay_dead_letter(
    p_id text, p_actor text, p_reason text, p_dry_run boolean default false, p_request_id text default null,
    p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_letter outbox.dead_letters;
begin
    select d.* into v_letter from outbox.dead_letters as d where d.id = p_id for update;
    if not found then
        return query select 'not_found', 'there is no dead letter ' || p_id;
        return;
    elsif v_letter.closed_as = 'discarded' then
        return query select 'refused', 'it was discarded by ' || coalesce(v_letter.closed_by, 'an operator') || ': '
            || v_letter.closed_because;
        return;
    elsif v_letter.closed_at is not null then
        return query select 'unchanged', 'it is closed already (' || v_letter.closed_as || ')';
        return;
    elsif p_dry_run then
        return query select 'would_replay', outbox.describe_replay(v_letter.handler);
        return;
    end if;
    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'replayed', closed_by = p_actor, closed_because = p_reason
    where d.id = p_id;
    insert into outbox.retries (handler, event_id, attempts, due_at)
    values (v_letter.handler, v_letter.event_id, v_letter.attempts, v_now)
    on conflict (handler, event_id) do nothing;
    perform outbox.audit_dead_letter_action(v_letter, 'replayed', p_actor, p_reason, p_request_id, p_address);
    perform outbox.schedule_handlers(array[v_letter.handler]);
    return query select 'replayed', outbox.describe_replay(v_letter.handler);
end;
$$;

comment on function outbox.replay_dead_letter(text, text, text, boolean, text, text) is
'Makes the event of a dead letter due again at once, without its failures. Outcomes: replayed; would_replay (p_dry_run);
unchanged (replayed already, or its payment has ended); refused (it was discarded); not_found.';

create or replace function outbox.discard_dead_letter(
    p_id text, p_actor text, p_reason text, p_dry_run boolean default false, p_request_id text default null,
    p_address text default null
) returns table (outcome text, detail text)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Locks the payment, then the letter: nothing can be sent for it between the verdict and its effect.
declare
    v_now timestamptz := surety.time_now();
    v_letter outbox.dead_letters;
    v_verdict text;
    v_detail text;
begin
    perform from surety.payments as p
    where p.id = (select d.payment_id from outbox.dead_letters as d where d.id = p_id)
    for update;
    select d.* into v_letter from outbox.dead_letters as d where d.id = p_id for update;
    if not found then
        return query select 'not_found', 'there is no dead letter ' || p_id;
        return;
    elsif v_letter.closed_as = 'discarded' then
        return query select 'unchanged', 'it is closed already (discarded)';
        return;
    elsif v_letter.closed_at is not null then
        return query select 'refused', 'it is closed already (' || v_letter.closed_as || ')';
        return;
    end if;
    select j.verdict, j.detail into v_verdict, v_detail from outbox.discard_effect(v_letter) as j;
    if v_verdict = 'refuse' then
        return query select 'refused', v_detail;
        return;
    elsif p_dry_run then
        return query select 'would_discard', v_detail;
        return;
    end if;
    -- Close the letter first: the end of its payment would otherwise close it as resolved.
    update outbox.dead_letters as d
    set closed_at = v_now, closed_as = 'discarded', closed_by = p_actor, closed_because = p_reason
    where d.id = p_id;
    if v_verdict = 'fail' and v_letter.handler in ('refund', 'capture') then
        perform surety.record_refused_calls(jsonb_build_array(jsonb_build_object(
            'payment_id', v_letter.payment_id, 'operation', v_letter.handler,
            'refund_id', v_letter.payload ->> 'refund_id',
            'refused', jsonb_build_object('code', 'processing_error', 'message', 'It could not be processed.'))),
            p_actor);
    elsif v_verdict = 'fail' then
        update surety.payments as p
        set failure = jsonb_build_object(
            'code', 'processing_error', 'message', 'It could not be processed. Nothing was charged.')
        where p.id = v_letter.payment_id;
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor, request_id)
        select p.id, p.version + 1, p.state, 'failed', 'discarded', v_now, p_actor, p_request_id
        from surety.payments as p where p.id = v_letter.payment_id;
    elsif v_letter.handler = 'evidence' then
        perform surety.reopen_evidence(
            v_letter.payload ->> 'dispute_id', (v_letter.payload ->> 'evidence_revision')::integer,
            jsonb_build_object('code', 'processing_error', 'message', 'It could not be submitted.'));
    elsif v_verdict = 'cancel' then
        perform outbox.emit_event(
            'payment', p.id, 'payment.action_overdue',
            jsonb_build_object('payment_id', p.id, 'reason', 'discarded'), null, p.version)
        from surety.payments as p where p.id = v_letter.payment_id;
    end if;
    perform outbox.audit_dead_letter_action(v_letter, 'discarded', p_actor, p_reason, p_request_id, p_address);
    if v_verdict = 'cancel' then
        perform outbox.schedule_handlers(array['cancel']);
    end if;
    return query select 'discarded', v_detail;
end;
$$;

comment on function outbox.discard_dead_letter(text, text, text, boolean, text, text) is
'Discards the event of a dead letter, with the effect that outbox.discard_effect names. Outcomes: discarded;
would_discard (p_dry_run); unchanged (discarded already); refused (the provider may hold a charge, or the letter was
replayed or resolved); not_found.';
