-- Holds of new payments, in the transaction that accepts them (api.create_payments).

create or replace function api.hold_new_payments(
    p_payments surety.payments[], p_keys surety.idempotency_keys[], p_held jsonb, p_at timestamptz
) returns surety.payments[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    for v_place in 1 .. cardinality(p_payments) loop
        if p_held ? p_payments[v_place].id then
            p_payments[v_place].flags := p_payments[v_place].flags || jsonb_build_object(
                'hold', surety.show_hold('open', p_at, p_at + surety.hold_lifetime(), null));
            update surety.idempotency_keys as i
            set response = (select shown.document::text from api.show_payment(p_payments[v_place]) as shown)
            from unnest(p_keys) as k
            where k.payment_id = p_payments[v_place].id
                and i.merchant_id = k.merchant_id and i.route = k.route and i.key = k.key;
        end if;
    end loop;
    return p_payments;
end;
$$;

comment on function api.hold_new_payments(surety.payments[], surety.idempotency_keys[], jsonb, timestamptz) is
'New payments that are not stored yet, those whose ids are keys of p_held with an open hold. The stored answers to their
requests show it.';
