-- Calls to providers about customers: written before they are sent, and their results.
--
--   create_customer   before the first payment of a customer. The request holds our id only, so it is the same for ever
--   update_customer   passes the customer's present data on; the last version counts
--   save_method       reads the payment method of a payment that succeeded
--   detach_method     detaches a payment method that the merchant removed, once no accepted payment needs it

create or replace function surety.stripe_customer_request(p_customer surety.customers, p_operation text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select case p_operation
        when 'create_customer' then jsonb_build_object('metadata', jsonb_build_object(
            'surety_customer', p_customer.id,
            'surety_environment', (select environment.id from surety.environment)
        ))
        -- Stripe removes fields whose text is empty.
        when 'update_customer' then jsonb_build_object(
            'email', coalesce(p_customer.email, ''),
            'name', coalesce(p_customer.name, ''),
            'phone', coalesce(p_customer.phone, ''),
            'description', coalesce(p_customer.description, ''),
            'shipping', coalesce(p_customer.shipping, '""')
        )
        else '{}'
    end;
end;

comment on function surety.stripe_customer_request(surety.customers, text) is
'The parameters of an operation on a customer, as Stripe names them.';

create or replace function surety.is_method_needed(p_customer surety.customers, p_method_id text) returns boolean
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select count(*) > 0
    from surety.payment_labels as l
    inner join surety.payments as p on l.payment_id = p.id
    where
        (l.merchant_id, l.name, l.value) = (p_customer.merchant_id, 'customer.id', p_customer.id)
        and p.saved_method_id = p_method_id
        and p.state in ('initiated', 'submitting', 'provider_submitted', 'requires_action');
end;

comment on function surety.is_method_needed(surety.customers, text) is
'Whether a payment was accepted with a saved payment method and is not confirmed at the provider yet.';

create or replace function surety.begin_customer_calls(
    p_batch bigint, p_fence bigint, p_operation text, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, customer_id text, payment_id text, verdict text, operation text, idempotency_key text, request jsonb,
    customer_version integer, account text, customer_provider_id text, object_id text, livemode boolean,
    first_sent_at timestamptz, last_sent_at timestamptz
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_now timestamptz := surety.time_now();
    -- No request is under way for longer.
    v_underway_max constant interval := '2 minutes';
begin
    perform from surety.customers as c
    where c.id in (
        select coalesce(p.customer_id, e.aggregate_id)
        from outbox.batch_events(p_batch, p_fence) as e
        left join surety.payments as p on p.id = e.aggregate_id
        where p_event_ids is null or e.event_id = any(p_event_ids)
    )
    order by c.id for no key update;
    return query
    with events as (
        select
            e.event_id, p.id as payment_id, coalesce(p.customer_id, e.aggregate_id) as customer_id, m.id as method_id,
            case when p_operation = 'detach_method' then m.provider_id else p.provider_id end as object_id,
            case
                when p_operation = 'save_method' then p_operation || ':' || p.id
                when p_operation = 'detach_method' then p_operation || ':' || m.id
                else p_operation
            end as operation
        from outbox.batch_events(p_batch, p_fence) as e
        left join surety.payments as p on p.id = e.aggregate_id
        left join surety.payment_methods as m on m.id = e.payload ->> 'payment_method'
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    judged as materialized (
        select
            e.*, c as customer, k.first_sent_at, k.last_sent_at, coalesce(k.sends, 0) as sends,
            case
                -- Several events may ask for one call.
                when 1 < row_number() over (partition by c.id, e.operation order by e.event_id) then 'skip'
                when p_operation = 'create_customer' then case
                    when c.provider_id is not null then 'skip'
                    when k.customer_id is null then 'send'
                    when k.first_sent_at > v_now - surety.call_key_lifetime() and coalesce(k.status, 0) < 500
                        then 'send'
                    else 'replace_key'
                end
                when p_operation = 'update_customer' then case
                    when c.provider_id is null or c.provider_version >= c.version then 'skip'
                    -- A request that arrives late must not overwrite a later one.
                    when k.answered_at is null and k.last_sent_at > v_now - v_underway_max then 'wait'
                    else 'send'
                end
                when p_operation = 'save_method' then case
                    when exists (select from surety.payment_methods as saved where saved.payment_id = e.payment_id)
                        then 'skip'
                    else 'send'
                end
                when k.status between 200 and 299 then 'skip'
                when surety.is_method_needed(c, e.method_id) then 'wait'
                when k.customer_id is null then 'send'
                else 'ask'
            end as verdict
        from events as e
        join surety.customers as c on c.id = e.customer_id
        left join surety.customer_calls as k on k.customer_id = c.id and k.operation = e.operation
    ),
    written as (
        insert into surety.customer_calls as k (
            customer_id, operation, idempotency_key, customer_version, first_sent_at, last_sent_at
        )
        select
            j.customer_id, j.operation,
            j.customer_id || ':' || j.operation || case
                when p_operation = 'update_customer' then concat(':', (j.customer).version, ':', j.sends + 1)
                when p_operation = 'detach_method' then concat(':', j.sends + 1)
                else ''
            end,
            (j.customer).version, v_now, v_now
        from judged as j where j.verdict not in ('skip', 'wait')
        order by j.customer_id, j.operation
        on conflict on constraint customer_calls_pkey do update
        set
            sends = k.sends + 1, last_sent_at = excluded.last_sent_at, customer_version = excluded.customer_version,
            -- A customer is created under the key of its first send, until that is replaced.
            idempotency_key = case
                when p_operation = 'create_customer' then k.idempotency_key else excluded.idempotency_key
            end,
            answered_at = null, status = null
        returning k.*
    ),
    audited as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, j.payment_id, (j.customer).merchant_id,
            case when j.verdict = 'send' and p_operation <> 'save_method' then 'sent' else 'asked' end,
            jsonb_build_object(
                'operation', j.operation, 'key', w.idempotency_key, 'sends', w.sends, 'customer', j.customer_id)
        from judged as j join written as w on w.customer_id = j.customer_id and w.operation = j.operation
        where j.verdict not in ('skip', 'wait')
    )
    select
        j.event_id, j.customer_id, j.payment_id, j.verdict, j.operation, w.idempotency_key,
        surety.stripe_customer_request(j.customer, p_operation), (j.customer).version, (j.customer).provider_account,
        (j.customer).provider_id, j.object_id, (j.customer).livemode, j.first_sent_at,
        coalesce(j.last_sent_at, v_now)
    from judged as j
    left join written as w
        on w.customer_id = j.customer_id and w.operation = j.operation and j.verdict not in ('skip', 'wait')
    order by j.event_id;
end;
$$;

comment on function surety.begin_customer_calls(bigint, bigint, text, text, text[]) is
'Writes the calls of one operation about customers before they are sent. One row for each event left in the batch (of
p_event_ids, if given): the verdict as surety.call_verdicts explains it, the request and its key. object_id is the
intent or payment method at the provider. No rows when another worker holds the lease.';

create or replace function surety.replace_customer_call_key(p_customer_id text, p_operation text) returns text
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    update surety.customer_calls
    set
        idempotency_key = customer_calls.customer_id || ':' || customer_calls.operation || ':' || customer_calls.sends,
        first_sent_at = surety.time_now(),
        last_sent_at = surety.time_now()
    where customer_calls.customer_id = p_customer_id and customer_calls.operation = p_operation
    returning customer_calls.idempotency_key;
end;

comment on function surety.replace_customer_call_key(text, text) is
'Gives a call about a customer a new idempotency key and returns it.';

create or replace function surety.record_created_customer(p_customer_id text, p_provider_id text, p_at timestamptz)
returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_customer surety.customers;
begin
    update surety.customers as c set provider_id = p_provider_id
    where c.id = p_customer_id and c.provider_id is null
    returning c.* into v_customer;
    if not found then
        perform surety.open_discrepancy(
            'duplicate', p_provider_id, 'notice',
            format('%s is a second customer beside %s', p_provider_id, c.provider_id),
            jsonb_build_array(surety.differing_value('customer', c.provider_id, p_provider_id)), c.id, p_provider_id,
            p_at, p_merchant_id => c.merchant_id)
        from surety.customers as c where c.id = p_customer_id and c.provider_id <> p_provider_id;
        return '{}';
    end if;
    if num_nonnulls(
        v_customer.email, v_customer.name, v_customer.phone, v_customer.description, v_customer.shipping) = 0
    then
        update surety.customers as c set provider_version = c.version where c.id = p_customer_id;
        return '{}';
    end if;
    perform surety.emit_customer_event(v_customer, 'customer.out_of_date', p_at);
    return array['customer.out_of_date'];
end;
$$;

comment on function surety.record_created_customer(text, text, timestamptz) is
'Notes which customer at the provider is ours; its data are passed on by another call. A second one is a discrepancy.
Returns the types of the events made.';

create or replace function surety.record_saved_method(p_payment_id text, p_method jsonb, p_at timestamptz)
returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_method surety.payment_methods;
    v_customer surety.customers;
    v_type text;
begin
    insert into surety.payment_methods as m (
        id, customer_id, merchant_id, type, brand, last4, exp_month, exp_year, country, fingerprint, provider_id, usage,
        mandate, payment_id, created_at, detached_at
    )
    select
        surety.new_id('spm', p_at), p.customer_id, p.merchant_id, 'card', p_method ->> 'brand', p_method ->> 'last4',
        (p_method ->> 'exp_month')::smallint, (p_method ->> 'exp_year')::smallint, p_method ->> 'country',
        case when not erased.is_erased then p_method ->> 'fingerprint' end, p_method ->> 'id',
        p.save_method ->> 'usage', case when erased.is_erased then '{}' else p.save_method -> 'mandate' end, p.id,
        p_at, case when erased.is_erased then p_at end
    from surety.payments as p
    join surety.customers as c on c.id = p.customer_id
    -- An erasure has removed the payer's consent: the method is not kept, and a worker detaches it at the provider.
    cross join lateral (
        select c.erased_at is not null or not coalesce(p.save_method ? 'mandate', false) as is_erased
    ) as erased
    where p.id = p_payment_id and p.save_method is not null
    -- The method is saved already: of another payment, or by another worker.
    on conflict (customer_id, provider_id) do nothing
    returning m.* into v_method;
    if not found then
        return '{}';
    end if;
    select c.* into v_customer from surety.customers as c where c.id = v_method.customer_id;
    v_type := case
        when v_method.detached_at is null then 'customer.payment_method_saved'
        else 'customer.payment_method_detached'
    end;
    perform surety.emit_method_event(v_customer, v_method.id, v_type, p_at);
    return array[v_type];
end;
$$;

comment on function surety.record_saved_method(text, jsonb, timestamptz) is
'Saves the payment method of a payment that asked for it, as the provider shows it: {id, brand?, last4?, exp_month?,
exp_year?, country?, fingerprint?}. If the payer''s data were erased since, it is detached instead. Returns the types of
the events made.';

create or replace function surety.repeat_overtaken_update(p_customer_id text, p_version integer, p_at timestamptz)
returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_customer surety.customers;
begin
    update surety.customers as c set provider_version = p_version
    where c.id = p_customer_id and c.provider_version > p_version
    returning c.* into v_customer;
    if not found then
        return '{}';
    end if;
    perform surety.emit_customer_event(v_customer, 'customer.out_of_date', p_at);
    return array['customer.out_of_date'];
end;
$$;

comment on function surety.repeat_overtaken_update(text, integer, timestamptz) is
'After the result of an update with an older version than the provider has answered about: it may have arrived late, at
a worker or at the provider, so the present data are passed on again. Returns the types of the events made.';

create or replace function surety.saved_methods_among(p_account text, p_provider_ids text[]) returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(array_agg(distinct m.provider_id), '{}')
    from surety.payment_methods as m
    inner join surety.customers as c on m.customer_id = c.id
    where m.provider_id = any(p_provider_ids) and c.provider_account = p_account and m.detached_at is null;
end;

comment on function surety.saved_methods_among(text, text[]) is
'Those of an account''s payment methods, by the provider''s ids, that are saved here and not detached.';

create or replace function surety.record_method_state(p_account text, p_method jsonb, p_is_detached boolean)
returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_customer surety.customers;
    v_method surety.payment_methods;
    v_shown surety.payment_methods;
    v_type text;
    v_types text [] := '{}';
begin
    for v_customer in
        select c.* from surety.customers as c
        where c.provider_account = p_account and c.id in (
            select m.customer_id from surety.payment_methods as m where m.provider_id = p_method ->> 'id'
        )
        order by c.id for no key update
    loop
        select m.* into v_method from surety.payment_methods as m
        where m.customer_id = v_customer.id and m.provider_id = p_method ->> 'id' and m.detached_at is null
        for no key update;
        continue when not found;
        v_shown := jsonb_populate_record(v_method, p_method - 'id');
        continue when not p_is_detached and v_shown = v_method;
        update surety.payment_methods as m
        set
            brand = v_shown.brand, last4 = v_shown.last4, exp_month = v_shown.exp_month, exp_year = v_shown.exp_year,
            country = v_shown.country, fingerprint = v_shown.fingerprint,
            detached_at = case when p_is_detached then v_now end
        where m.id = v_method.id;
        v_type := case
            when p_is_detached then 'customer.payment_method_detached' else 'customer.payment_method_updated'
        end;
        perform surety.emit_method_event(v_customer, v_method.id, v_type, v_now);
        v_types := v_types || v_type;
    end loop;
    return v_types;
end;
$$;

comment on function surety.record_method_state(text, jsonb, boolean) is
'Records what the provider shows of a saved payment method: {id, brand?, last4?, exp_month?, exp_year?, country?,
fingerprint?}, a part that is absent stays as it is; and whether it is detached there. A change has an event. Methods
that are not saved here, or are detached, are left as they are. Returns the types of the events made.';

create or replace function surety.record_customer_results(p_results jsonb) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_types text [] := '{}';
    v_result record;
begin
    perform from surety.customers as c
    where c.id in (
        select r.result -> 'customer' ->> 'id' from jsonb_array_elements(p_results) as r (result)
        where r.result ? 'customer'
    )
    order by c.id for no key update;
    for v_result in
        select r.payment_id, r.operation, r.status, r.outcome, a.*
        from jsonb_to_recordset(p_results) as r (
            payment_id text, operation text, status smallint, outcome text, customer jsonb
        )
        cross join lateral jsonb_to_record(r.customer) as a (
            id text, version integer, provider_id text, method jsonb, failure jsonb
        )
        where r.customer is not null
        order by a.id, r.operation
    loop
        update surety.customer_calls as k
        set answered_at = v_now, status = v_result.status
        where k.customer_id = v_result.id and k.operation = v_result.operation and v_result.status is not null;
        if v_result.operation = 'update_customer' and v_result.outcome in ('answered', 'unknown') then
            v_types := v_types || surety.repeat_overtaken_update(v_result.id, v_result.version, v_now);
        end if;
        continue when v_result.outcome not in ('answered', 'refused');
        case
            when v_result.operation = 'create_customer' then
                v_types := v_types || surety.record_created_customer(v_result.id, v_result.provider_id, v_now);
            when v_result.operation = 'update_customer' then
                update surety.customers as c
                set provider_version = v_result.version, provider_failure = v_result.failure
                where c.id = v_result.id and c.provider_version < v_result.version;
            when v_result.operation like 'save_method:%' then
                if v_result.method is not null then
                    v_types := v_types || surety.record_saved_method(v_result.payment_id, v_result.method, v_now);
                end if;
            when v_result.operation like 'detach_method:%' then
                null;
        end case;
    end loop;
    return v_types;
end;
$$;

comment on function surety.record_customer_results(jsonb) is
'Records those results of calls that have customer: {id, version?, provider_id?, method?, failure?}. Locks the
customers. Returns the types of the events made.';
