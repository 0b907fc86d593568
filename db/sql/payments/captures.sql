-- Captures. A merchant's request is a fact of our own; so is its refusal by the provider.

create or replace function surety.pending_capture(p_payment_id text)
returns table (amount_minor bigint, revision integer)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
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

comment on function surety.pending_capture(text) is
'The capture that is under way: requested and not refused, amount in minor units. No row if there is none.';

create or replace function surety.request_capture(
    p_payment surety.payments, p_amount_minor bigint, p_actor text, p_request_id text
) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- The request is a fact, so that facts of the provider, in any order, can't undo the step to processing. Its object is
-- the payment. Its revision counts the requests: a new request may follow a refused one.
declare
    v_now timestamptz := surety.time_now();
    v_object constant text := p_payment.id || ':capture';
begin
    perform surety.store_command_fact(surety.new_fact(
        p_id => surety.new_id('fct', v_now), p_payment_id => p_payment.id, p_provider => p_payment.provider,
        p_account => p_payment.provider_account, p_livemode => p_payment.livemode, p_object_id => v_object,
        p_kind => 'capture_requested',
        p_revision => surety.next_fact_revision(
            p_payment.provider, p_payment.provider_account, p_payment.livemode, v_object),
        p_amount_minor => p_amount_minor, p_currency => p_payment.currency, p_source => 'request',
        p_source_id => p_request_id, p_recorded_at => v_now));
    delete from surety.calls as c where c.payment_id = p_payment.id and c.operation = 'capture';
    perform surety.advance_payments(
        array(select d from surety.derive_payments(array[p_payment.id]) as d), 'command', p_actor, p_request_id);
    perform outbox.emit_event(
        'payment', p_payment.id, 'payment.capture_requested',
        jsonb_build_object('payment_id', p_payment.id, 'amount', p_amount_minor), null, null);
end;
$$;

comment on function surety.request_capture(surety.payments, bigint, text, text) is
'Records that a merchant asked to capture an amount in minor units of an authorized payment, which is locked: a fact,
the step to processing and payment.capture_requested, whose handler captures it.';
