-- Captures: what a merchant asked to capture.

create or replace function surety.pending_capture(p_payment_id text)
returns table (amount_minor bigint, revision integer)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- The capture that is under way, if any: asked for and not refused.
    select
        facts.amount_minor,
        facts.revision
    from surety.facts
    where
        facts.payment_id = p_payment_id and facts.kind = 'capture_requested' and not exists (
            select from surety.facts as refused
            where
                refused.payment_id = facts.payment_id and refused.object_id = facts.object_id
                and refused.kind = 'capture_refused' and refused.revision = facts.revision
        )
    order by facts.revision desc
    limit 1;
end;

create or replace function surety.request_capture(
    p_payment surety.payments, p_amount_minor bigint, p_actor text, p_request_id text
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Our command is a fact too: so what the provider says meanwhile, in whatever order, can't undo the step to processing.
-- The payment is locked. Its object is our own; its revision counts the commands, for one that was refused may be
-- followed by another.
declare
    v_now timestamptz := surety.time_now();
    v_object constant text := p_payment.id || ':capture';
    v_fact text := surety.new_id('fct', v_now);
    v_revision integer := surety.next_fact_revision(
        p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object);
begin
    insert into surety.fact_keys (provider, account, livemode, object_id, kind, revision, fact_id)
    values (
        p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object, 'capture_requested', v_revision,
        v_fact
    );
    insert into surety.facts (
        id, payment_id, provider, account, livemode, object_id, kind, revision, amount_minor, currency, source,
        source_id, recorded_at
    )
    values (
        v_fact, p_payment.id, p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object,
        'capture_requested', v_revision, p_amount_minor, p_payment.currency, 'request', p_request_id, v_now
    );
    delete from surety.calls as c where c.payment_id = p_payment.id and c.operation = 'capture';
    perform surety.advance_payments(
        array(select d from surety.derive_payments(array[p_payment.id]) as d), 'command', p_actor, p_request_id);
    perform outbox.emit_event(
        'payment', p_payment.id, 'payment.capture_requested',
        jsonb_build_object('payment_id', p_payment.id, 'amount', p_amount_minor), null, null);
end;
$$;
