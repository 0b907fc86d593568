-- Cancel a payment; change its metadata.

create or replace function api.cancel_payment(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/payments/{id}/cancel', 'payments:write', p_request);
    v_payment surety.payments;
    v_status integer := 202;
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
    if v_payment.state in ('initiated', 'submitting') and surety.is_surely_unexecuted(v_payment.id) then
        v_status := 200;
        insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor, request_id)
        values (
            v_payment.id, v_payment.version + 1, v_payment.state, 'canceled', 'command', v_admitted.admitted_at,
            v_admitted.actor, p_request ->> 'request_id'
        );
    elsif v_payment.state not in ('submitting', 'provider_submitted', 'requires_action', 'authorized') then
        return api.refuse_command(v_admitted, 'wrong-state', jsonb_build_object(
            'state', v_payment.state,
            'reason', case when v_payment.state = 'processing' then 'it is being processed' end));
    elsif not v_payment.flags ? 'cancel_requested_at' then
        update surety.payments as p
        set flags = p.flags || jsonb_build_object('cancel_requested_at', surety.format_time(v_admitted.admitted_at))
        where p.id = v_payment.id;
        perform outbox.emit_event(
            'payment', v_payment.id, 'payment.cancel_requested',
            jsonb_build_object('payment_id', v_payment.id, 'reason', 'requested'), null, null);
    end if;
    return api.complete_command(
        v_admitted, p_request, v_payment.id, v_status,
        (
            select shown.document::text
            from surety.payments as p cross join lateral api.show_payment(p) as shown
            where p.id = v_payment.id
        ),
        '{}');
end;
$$;

comment on function api.cancel_payment(jsonb) is
'Cancels a payment; p_request as for api.admit_command, with payment_id.
200 and the canceled payment if nothing was sent to the provider yet, or each send was refused for want of access.
Otherwise 202 and the payment as it is: the provider is asked to cancel it, and it may have succeeded before.
Problems: not-found; wrong-state, detail {state, reason}.';

create or replace function api.update_payment(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/payments/{id}', 'payments:write', p_request);
    v_keys_max constant integer := 50;
    v_payment surety.payments;
    v_metadata jsonb;
    v_keys integer;
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
    v_metadata := jsonb_strip_nulls(v_payment.metadata || (p_request -> 'metadata'));
    v_keys := (select count(*) from jsonb_object_keys(v_metadata));
    if v_keys > v_keys_max then
        return api.refuse_command(v_admitted, 'invalid-request', jsonb_build_object(
            'field', '/metadata', 'rule', 'max_entries', 'limit', v_keys_max, 'given', v_keys));
    end if;
    delete from surety.payment_labels as l
    using surety.labels_of_payment(v_payment) as old
    where l.merchant_id = v_payment.merchant_id and l.name = old.name and l.value = old.value
        and l.payment_id = v_payment.id;
    update surety.payments as p
    set metadata = v_metadata, updated_at = v_admitted.admitted_at
    where p.id = v_payment.id
    returning * into v_payment;
    insert into surety.payment_labels (merchant_id, name, value, payment_id)
    select v_payment.merchant_id, l.name, l.value, v_payment.id from surety.labels_of_payment(v_payment) as l;
    return api.complete_command(
        v_admitted, p_request, v_payment.id, 200,
        (select shown.document::text from api.show_payment(v_payment) as shown),
        jsonb_build_object('metadata_keys', to_jsonb(array(
            select given.key from jsonb_object_keys(p_request -> 'metadata') as given (key) order by given.key))));
end;
$$;

comment on function api.update_payment(jsonb) is
'Merges metadata into a payment''s; a null removes its key. p_request as for api.admit_command, with payment_id and
metadata {key: text or null}. 200 and the payment. Problems: not-found; invalid-request, detail {field, rule, limit,
given}: it would have more than 50 keys.';
