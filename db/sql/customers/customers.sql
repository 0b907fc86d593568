-- Customers: their events, and payments that meet their erasure.

create or replace function surety.emit_customer_event(p_customer surety.customers, p_type text, p_at timestamptz)
returns text
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    -- An event outlives an erasure, so it holds no personal data.
    select outbox.emit_event(
        'customer', p_customer.id, p_type,
        jsonb_build_object(
            'customer_id', p_customer.id, 'version', p_customer.version, 'at', surety.format_time(p_at)
        ),
        p_customer.merchant_id, p_customer.version
    );
end;

comment on function surety.emit_customer_event(surety.customers, text, timestamptz) is
'Emits an event about a customer and returns its id. The event names the customer and its version only.';

create or replace function surety.emit_method_event(
    p_customer surety.customers, p_method_id text, p_type text, p_at timestamptz
) returns text
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select outbox.emit_event(
        'customer', p_customer.id, p_type,
        jsonb_build_object(
            'customer_id', p_customer.id, 'version', p_customer.version, 'at', surety.format_time(p_at),
            'payment_method', p_method_id
        ),
        p_customer.merchant_id, p_customer.version
    );
end;

comment on function surety.emit_method_event(surety.customers, text, text, timestamptz) is
'Emits an event about a saved payment method of a customer and returns its id.';

create or replace function surety.refuse_erased_customers(p_labels jsonb[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    -- An erasure locks its customer against the foreign keys of new payments (surety.erase_customer). One that was
    -- committed before them is found here: the batch is repeated, and refuses them.
    if exists (
        select from unnest(p_labels) as l (label) join surety.customers as c on c.id = l.label ->> 'customer.id'
        where c.erased_at is not null
    ) then
        raise exception 'a customer was erased meanwhile' using errcode = 'serialization_failure';
    end if;
end;
$$;

comment on function surety.refuse_erased_customers(jsonb[]) is
'Raises serialization_failure if a customer of new payments, given by their labels, was erased while they were stored.';
