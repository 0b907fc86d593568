-- Capture a payment.

create or replace function api.capture_payment(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command(
        'POST /v1/payments/{id}/capture', 'payments:write', p_request, p_takes_money => true
    );
    v_payment surety.payments;
    v_authorized bigint;
    v_amount bigint;
    v_broken jsonb;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    select p.* into v_payment from surety.payments as p
    where p.id = p_request ->> 'payment_id' and p.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse_command(v_admitted, 'not-found', null);
    end if;
    if v_payment.state <> 'authorized' or v_payment.flags ? 'cancel_requested_at' then
        return api.refuse_command(v_admitted, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.flags ? 'cancel_requested_at' then 'its cancellation was asked for' end));
    end if;
    select api.whole_steps(least(v_payment.amount_minor, max(f.amount_minor)), v_payment.currency) into v_authorized
    from surety.facts as f
    where f.payment_id = v_payment.id and f.kind = 'authorized' and f.disregarded is null;
    v_amount := coalesce((p_request ->> 'amount')::bigint, v_authorized);
    v_broken := api.check_part(v_amount, v_authorized, v_payment.currency);
    if v_broken is not null then
        return api.refuse_command(v_admitted, 'invalid-request', v_broken);
    end if;
    perform surety.request_capture(v_payment, v_amount, v_admitted.actor, p_request ->> 'request_id');
    return api.complete_command(
        v_admitted, p_request, v_payment.id, 202,
        (
            select shown.document::text
            from surety.payments as p cross join lateral api.show_payment(p) as shown
            where p.id = v_payment.id
        ),
        jsonb_build_object('amount', v_amount, 'currency', v_payment.currency));
end;
$$;

comment on function api.capture_payment(jsonb) is
'Captures the authorized amount or a part of it, once; p_request as for api.admit_command, with payment_id and
optionally amount in minor units. 202 and the payment, processing.
Problems: not-found; wrong-state, detail {state, reason}; invalid-request if the amount exceeds the authorized one or is
no multiple of the currency''s step.';
