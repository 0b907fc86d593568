-- Customers and their saved payment methods: create, read, list, update, detach.

create or replace function api.create_customer(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/customers', 'payments:write', p_request);
    v_now timestamptz := v_admitted.admitted_at;
    v_customer surety.customers;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    insert into surety.customers (
        id, merchant_id, livemode, email, folded_email, name, phone, description, shipping, metadata, provider,
        provider_account, created_at, updated_at
    )
    select
        surety.new_id('cus', v_now), m.id, m.livemode, p_request ->> 'email',
        surety.fold_email(p_request ->> 'email'), p_request ->> 'name', p_request ->> 'phone',
        p_request ->> 'description', nullif(p_request -> 'shipping', 'null'),
        coalesce(p_request -> 'metadata', '{}'), 'stripe', m.provider_account, v_now, v_now
    from surety.merchants as m where m.id = v_admitted.merchant_id
    returning * into v_customer;
    perform surety.emit_customer_event(v_customer, 'customer.created', v_now);
    return api.complete_command(
        v_admitted, p_request, null, 201, (select shown.document::text from api.show_customer(v_customer) as shown),
        jsonb_build_object('customer', v_customer.id));
end;
$$;

comment on function api.create_customer(jsonb) is
'Creates a customer; p_request as for api.admit_command, with email, name, phone, description, shipping and metadata,
all optional. 201 and the customer. The provider gets it with its first payment.';

create or replace function api.update_customer(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/customers/{id}', 'payments:write', p_request);
    v_keys_max constant integer := 50;
    v_customer surety.customers;
    v_changed surety.customers;
    v_metadata jsonb;
    v_keys integer;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    select c.* into v_customer from surety.customers as c
    where c.id = p_request ->> 'customer_id' and c.merchant_id = v_admitted.merchant_id
    for no key update;
    if not found then
        return api.refuse_command(v_admitted, 'not-found', null);
    end if;
    if v_customer.erased_at is not null then
        return api.refuse_command(v_admitted, 'wrong-state', '{"state": "erased"}');
    end if;
    v_metadata := jsonb_strip_nulls(v_customer.metadata || coalesce(nullif(p_request -> 'metadata', 'null'), '{}'));
    v_keys := (select count(*) from jsonb_object_keys(v_metadata));
    if v_keys > v_keys_max then
        return api.refuse_command(v_admitted, 'invalid-request', jsonb_build_object(
            'field', '/metadata', 'rule', 'max_entries', 'limit', v_keys_max, 'given', v_keys));
    end if;
    v_changed := v_customer;
    v_changed.metadata := v_metadata;
    v_changed.email := case when p_request ? 'email' then p_request ->> 'email' else v_customer.email end;
    v_changed.name := case when p_request ? 'name' then p_request ->> 'name' else v_customer.name end;
    v_changed.phone := case when p_request ? 'phone' then p_request ->> 'phone' else v_customer.phone end;
    v_changed.description := case
        when p_request ? 'description' then p_request ->> 'description' else v_customer.description
    end;
    v_changed.shipping := case
        when p_request ? 'shipping' then nullif(p_request -> 'shipping', 'null') else v_customer.shipping
    end;
    if v_changed is distinct from v_customer then
        update surety.customers as c
        set
            version = c.version + 1, updated_at = v_admitted.admitted_at, metadata = v_changed.metadata,
            email = v_changed.email, folded_email = surety.fold_email(v_changed.email), name = v_changed.name,
            phone = v_changed.phone, description = v_changed.description, shipping = v_changed.shipping
        where c.id = v_customer.id
        returning * into v_customer;
        perform surety.emit_customer_event(v_customer, 'customer.updated', v_admitted.admitted_at);
        if v_customer.provider_id is not null then
            perform surety.emit_customer_event(v_customer, 'customer.out_of_date', v_admitted.admitted_at);
        end if;
    end if;
    return api.complete_command(
        v_admitted, p_request, null, 200, (select shown.document::text from api.show_customer(v_customer) as shown),
        jsonb_build_object('customer', v_customer.id, 'fields', to_jsonb(array(
            select given.name
            from unnest(array['email', 'name', 'phone', 'description', 'shipping', 'metadata']) as given (name)
            where p_request ? given.name))));
end;
$$;

comment on function api.update_customer(jsonb) is
'Changes the given fields of a customer: null removes one, metadata are merged. p_request as for api.admit_command, with
customer_id and the fields. 200 and the customer; without an effect its version stays, and no event is made. Problems:
not-found; wrong-state, detail {state: erased}; invalid-request, detail {field, rule, limit, given}: it would have more
than 50 keys of metadata.';

create or replace function api.get_customer(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.customers cross join lateral api.show_customer(customers) as shown
            where customers.id = p_id and customers.merchant_id = who.merchant_id
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_customer(bytea, text, text) is
'A customer of the merchant; body is null if it has none of that id. No row: the key may not read.';

create or replace function api.list_customers(
    p_key_hash bytea, p_email text, p_limit integer, p_starting_after text, p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
    v_before text := coalesce(p_starting_after, 'cus_g');
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from surety.customers as c where c.id = p_starting_after and c.merchant_id = v_merchant
    ) then
        perform api.refuse_cursor();
    end if;
    if p_email is null then
        v_ids := array(
            select c.id from surety.customers as c
            where c.merchant_id = v_merchant and c.id < v_before
            order by c.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select c.id from surety.customers as c
            where c.merchant_id = v_merchant and c.folded_email = surety.fold_email(p_email) and c.id < v_before
            order by c.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select shown.document
            from surety.customers as c cross join lateral api.show_customer(c) as shown
            where c.id = any(v_ids)
            order by c.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_customers(bytea, text, integer, text, text) is
'A page of the merchant''s customers, newest first; p_email: those with this address, in upper or lower case.
p_starting_after: the last id of the page before. No row: the key may not read.';

create or replace function api.list_payment_methods(
    p_key_hash bytea, p_customer_id text, p_limit integer, p_starting_after text, p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
begin
    if v_merchant is null then
        return;
    end if;
    if not exists (select from surety.customers as c where c.id = p_customer_id and c.merchant_id = v_merchant) then
        return query select v_merchant, null::text;
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from surety.payment_methods as m where m.id = p_starting_after and m.customer_id = p_customer_id
    ) then
        perform api.refuse_cursor();
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select shown.document
            from (
                select m.* from surety.payment_methods as m
                where m.customer_id = p_customer_id and m.detached_at is null
                    and m.id < coalesce(p_starting_after, 'spm_g')
                order by m.id desc
                limit p_limit + 1
            ) as m
            cross join lateral api.show_payment_method(m::surety.payment_methods) as shown
            order by m.id desc
        ),
        p_limit);
end;
$$;

comment on function api.list_payment_methods(bytea, text, integer, text, text) is
'A page of a customer''s saved payment methods, newest first, without those that are detached; body is null if the
merchant has no such customer. p_starting_after: the last id of the page before. No row: the key may not read.';

create or replace function api.detach_payment_method(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command(
        'DELETE /v1/customers/{id}/payment_methods/{id}', 'payments:write', p_request);
    v_ids text [] := string_to_array(p_request ->> 'payment_method_id', '/');
    v_customer surety.customers;
    v_method surety.payment_methods;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    select c.* into v_customer from surety.customers as c
    where c.id = v_ids[1] and c.merchant_id = v_admitted.merchant_id
    for no key update;
    select m.* into v_method from surety.payment_methods as m
    where m.id = v_ids[2] and m.customer_id = v_customer.id
    for no key update;
    if not found then
        return api.refuse_command(v_admitted, 'not-found', null);
    end if;
    if v_method.detached_at is null then
        update surety.payment_methods as m set detached_at = v_admitted.admitted_at where m.id = v_method.id
        returning m.* into v_method;
        perform surety.emit_method_event(
            v_customer, v_method.id, 'customer.payment_method_detached', v_admitted.admitted_at);
    end if;
    return api.complete_command(
        v_admitted, p_request, null, 200,
        (select shown.document::text from api.show_payment_method(v_method) as shown),
        jsonb_build_object('customer', v_customer.id, 'payment_method', v_method.id));
end;
$$;

comment on function api.detach_payment_method(jsonb) is
'Removes a saved payment method: no payment can name it any more, and a worker detaches it at the provider. p_request as
for api.admit_command, with payment_method_id, the ids of customer and method with / between. 200 and the method,
also if it was removed before. Problems: not-found.';

create or replace function api.check_customer(
    p_merchant_id text, p_customer_id text, p_saved_method text, p_at timestamptz
) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        case
            when p_customer_id is not null and customers.id is null
                then jsonb_build_object('field', '/customer_id', 'rule', 'known', 'given', p_customer_id)
            when customers.erased_at is not null
                then jsonb_build_object('field', '/customer_id', 'rule', 'erased', 'given', customers.id)
            when p_saved_method is not null and methods.id is null
                then jsonb_build_object('field', '/payment_method/saved', 'rule', 'known', 'given', p_saved_method)
            when methods.customer_id <> customers.id
                then jsonb_build_object('field', '/payment_method/saved', 'rule', 'owner', 'given', p_saved_method)
            when methods.detached_at is not null
                then jsonb_build_object('field', '/payment_method/saved', 'rule', 'detached', 'given', p_saved_method)
            -- A day of grace: the card is valid until its month has ended everywhere.
            when
                make_date(methods.exp_year, methods.exp_month, 1) + interval '1 month 1 day' < p_at at time zone 'UTC'
                then jsonb_build_object('field', '/payment_method/saved', 'rule', 'expired', 'given', p_saved_method)
        end
    from (values (p_merchant_id)) as asked (merchant_id)
    left join surety.payment_methods as methods
        on asked.merchant_id = methods.merchant_id and methods.id = p_saved_method
    left join surety.customers
        on
            asked.merchant_id = customers.merchant_id
            and customers.id = coalesce(p_customer_id, methods.customer_id);
end;

comment on function api.check_customer(text, text, text, timestamptz) is
'The rule that a payment''s customer or saved payment method breaks: {field, rule, given}; null if none. Either id may
be null. The rule is known, erased, owner (the method is another customer''s), detached or expired.';
