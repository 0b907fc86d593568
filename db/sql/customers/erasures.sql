-- Erasures: a payer's data are removed; ledger, steps, facts and the audit trail stay, which hold none.
--
--   begin_erasure        marks payments and customers: events about them are stored without a payer's data from then on
--   redact_events        removes the data from events that are stored already, a page at a time
--   erase_payment        removes the data from a payment and from what belongs to it
--   erase_customer       the same for a customer
--   redact_new_event     what surety.receive_webhooks stores of an event about an erased payment or customer
--
-- Each is a transaction of its own. The command finds payments by their labels, which erase_payment deletes last. So a
-- repetition after a kill finds the others.

create or replace function surety.redact_json(p_value jsonb, p_name text default '') returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
    return case jsonb_typeof(p_value)
        when 'object' then (
            select coalesce(jsonb_object_agg(part.key, surety.redact_json(part.value, part.key)), '{}')
            from jsonb_each(p_value) as part
            where p_name <> 'metadata' or part.key like 'surety\_%'
        )
        when 'array' then (
            select coalesce(jsonb_agg(surety.redact_json(part.value, p_name) order by part.n), '[]')
            from jsonb_array_elements(p_value) with ordinality as part (value, n)
        )
        when 'string' then case
            when p_name like 'surety\_%' or (p_value #>> '{}')
                ~ '^(acct|ch|cus|dp|du|env|evt|issfr|pay|pi|pm|po|py|pyr|re|ref|req|src|txn)_[0-9A-Za-z]{1,200}$'
            or p_name in (
                'object', 'status', 'currency', 'type', 'reason', 'api_version', 'reporting_category', 'capture_method',
                'confirmation_method', 'code', 'decline_code', 'fraud_type', 'cancellation_reason', 'failure_reason',
                'network_status'
            ) and (p_value #>> '{}') ~ '^[a-z0-9_.-]{1,100}$'
            then p_value
            else 'null'
        end
        else p_value
    end;
end;
$$;

comment on function surety.redact_json(jsonb, text) is
'A provider''s object without what may be a payer''s: of its texts only ids and words of fixed lists are left, of its
metadata only ours. Numbers, times and the names of fields stay. p_name is the field that holds the value.';

create or replace function surety.parse_event(p_body text) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
begin
    -- jsonb can't hold a zero character, which JSON may name.
    return replace(p_body, '\u0000', '')::jsonb;
exception
    when data_exception then return null;
end;
$$;

comment on function surety.parse_event(text) is 'The body of a provider''s event; null if it is no JSON.';

create or replace function surety.is_about_erased(
    p_provider text, p_account text, p_event jsonb, p_subject_ids text[] default null
) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- By keys, one table after the other: an erasure asks this of every stored event.
declare
    v_object jsonb := p_event #> '{data,object}';
    v_ids text [] := array_remove(array[
        p_event #>> '{related_object,id}', v_object ->> 'id',
        coalesce(v_object #>> '{payment_intent,id}', v_object ->> 'payment_intent'),
        coalesce(v_object #>> '{charge,id}', v_object ->> 'charge'),
        coalesce(v_object #>> '{latest_charge,id}', v_object ->> 'latest_charge'),
        coalesce(v_object #>> '{customer,id}', v_object ->> 'customer')
    ], null);
    v_subjects text [] := array(
        select o.payment_id from surety.provider_objects as o
        where o.provider = p_provider and o.account = p_account and o.object_id = any(v_ids)
    ) || array(
        select c.id from surety.customers as c
        where c.provider = p_provider and c.provider_account = p_account and c.provider_id = any(v_ids)
    ) || (v_object #>> '{metadata,surety_payment}');
begin
    if p_subject_ids is not null then
        return v_subjects && p_subject_ids;
    end if;
    return exists (select from surety.erasures as e where e.subject_id = any(v_subjects));
end;
$$;

comment on function surety.is_about_erased(text, text, jsonb, text[]) is
'Whether a provider''s event is about an erased payment or customer, by the ids of its object and the metadata.
p_subject_ids: about one of these instead.';

create or replace function surety.redact_new_event(p_provider text, p_account text, p_body text) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_event jsonb := surety.parse_event(p_body);
begin
    return case
        when surety.is_about_erased(p_provider, p_account, v_event) then surety.redact_json(v_event)::text
        else p_body
    end;
end;
$$;

comment on function surety.redact_new_event(text, text, text) is
'The body of a provider''s event as it is stored: without a payer''s data, if those were erased before it came.';

create or replace function surety.begin_erasure(p_subject_ids text[]) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    -- Waits for the transactions that store events and have not seen these rows; later ones see them.
    lock table surety.erasures in access exclusive mode;
    insert into surety.erasures (subject_id, begun_at)
    select asked.id, surety.time_now() from unnest(p_subject_ids) as asked (id)
    order by asked.id
    on conflict (subject_id) do nothing;
end;
$$;

comment on function surety.begin_erasure(text[]) is
'Marks payments and customers, so that what their provider reports from now on is stored without the payer''s data.';

create or replace function surety.redact_events(p_after text, p_until text, p_limit integer)
returns table (last_id text, redacted bigint)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with page as materialized (
        select
            listed.id,
            listed.provider,
            listed.account,
            listed.body
        from surety.provider_events as listed
        where listed.id > p_after and listed.id <= p_until
        order by listed.id
        limit p_limit
    ),

    redacted as (
        update surety.provider_events
        set body = changed.body
        from (
            select
                page.id,
                surety.redact_new_event(page.provider, page.account, page.body) as body,
                page.body as body_before
            from page
        ) as changed
        where
            provider_events.id = changed.id and provider_events.id > p_after and provider_events.id <= p_until
            and changed.body <> changed.body_before
        returning provider_events.id
    )

    select
        (select max(page.id) from page),
        (select count(*) from redacted);
end;

comment on function surety.redact_events(text, text, integer) is
'Removes the data of erased payments from the next p_limit events of providers after an id, up to another. last_id is
the last one that was read, null at the end.';

create or replace function surety.redact_answer(p_answer text) returns text
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
begin atomic
    select
        json_object_agg(
            part.key,
            case
                when part.key in (
                    'customer', 'description', 'email', 'fingerprint', 'mandate', 'name', 'phone', 'shipping'
                ) then 'null'
                when part.key = 'metadata' then '{}'
                when part.key = 'return_url' then to_json(surety.address_without_query(part.value #>> '{}'))
                else part.value
            end
            order by part.n
        )::text
    from json_each(p_answer::json) with ordinality as part (key, value, n);
end;

comment on function surety.redact_answer(text) is
'A document of the API without a payer''s data, its fields in the same order.';

create or replace function surety.find_answers(p_payment surety.payments) returns setof surety.idempotency_keys
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- The audit trail knows the keys of a payment's requests.
    select
        idempotency_keys.merchant_id,
        idempotency_keys.route,
        idempotency_keys.key,
        idempotency_keys.request_hash,
        idempotency_keys.payment_id,
        idempotency_keys.status,
        idempotency_keys.response,
        idempotency_keys.created_at
    from audit.entries
    inner join surety.idempotency_keys
        on
            idempotency_keys.merchant_id = p_payment.merchant_id
            and idempotency_keys.route = entries.snapshot ->> 'route'
            and idempotency_keys.key = entries.snapshot ->> 'idempotency_key'
    where entries.payment_id = p_payment.id and entries.id >= 'aud_' || substr(p_payment.id, 5, 11);
end;

comment on function surety.find_answers(surety.payments) is
'The stored answers to the requests about a payment, some of them several times.';

create or replace function surety.erase_answers(p_keys surety.idempotency_keys[]) returns bigint
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    with changed as (
        update surety.idempotency_keys
        set response = surety.redact_answer(idempotency_keys.response)
        from unnest(p_keys) as old
        where
            idempotency_keys.merchant_id = old.merchant_id and idempotency_keys.route = old.route
            and idempotency_keys.key = old.key and idempotency_keys.response like '{%'
            -- As values: the text of an answer without such data stays as it was.
            and idempotency_keys.response::jsonb <> surety.redact_answer(idempotency_keys.response)::jsonb
        returning idempotency_keys.key
    )

    select count(*) from changed;
end;

comment on function surety.erase_answers(surety.idempotency_keys[]) is
'Removes payers'' data from stored answers: a repeated request gets the rest. The hash of the request stays, by which a
repetition is known, until the key is deleted after 30 days. Returns how many have changed.';

create or replace function surety.find_rejected_webhooks(p_email text, p_name text, p_ids text[]) returns text[]
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select array(
        select rejected_webhooks.id
        from surety.rejected_webhooks
        where exists (
            select from unnest(
                array_remove(p_ids, null)
                -- Shorter ones may be words of any webhook.
                || case
                    when length(p_email) >= 5 and p_email like '%_@_%'
                        then array[p_email, lower(p_email collate "C"), surety.fold_email(p_email)]
                end
                || case when length(p_name) >= 5 and trim(p_name) like '% %' then array[p_name] end
            ) as words (word)
            where position(convert_to(words.word, 'UTF8') in rejected_webhooks.body) > 0
        )
    );
end;

comment on function surety.find_rejected_webhooks(text, text, text[]) is
'The ids of rejected webhooks that hold a payer''s address, its full name or one of our or the provider''s ids.';

create or replace function surety.delete_rejected_webhooks(p_email text, p_name text, p_ids text[]) returns bigint
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    with deleted as (
        delete from surety.rejected_webhooks
        where rejected_webhooks.id = any(surety.find_rejected_webhooks(p_email, p_name, p_ids))
        returning rejected_webhooks.id
    )

    select count(*) from deleted;
end;

comment on function surety.delete_rejected_webhooks(text, text, text[]) is
'Deletes the webhooks that surety.find_rejected_webhooks finds. Returns how many.';

create or replace function surety.words_of_payer(p_payment surety.payments) returns text[]
language sql immutable parallel safe set search_path = pg_catalog, pg_temp
begin atomic
    select array(
        select given.word
        from unnest(
            array[p_payment.customer ->> 'email', p_payment.customer ->> 'name', p_payment.description]
        ) as given (word)
        where length(given.word) > 2
        order by length(given.word) desc
    );
end;

comment on function surety.words_of_payer(surety.payments) is
'A payer''s address and name and a payment''s description, the longest first: what dead letters may quote.';

create or replace function surety.erase_payment(p_payment_id text) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_payment surety.payments;
    v_words text [];
    v_counts jsonb := '{}';
    v_count bigint;
begin
    select p.* into v_payment from surety.payments as p where p.id = p_payment_id for update;
    if surety.why_not_erasable(v_payment) is not null then
        -- What its provider reports is needed as it is.
        delete from surety.erasures as e where e.subject_id = p_payment_id and e.ended_at is null;
        return jsonb_build_object('refused', surety.why_not_erasable(v_payment));
    end if;
    v_words := surety.words_of_payer(v_payment);
    v_count := surety.erase_answers(array(select i from surety.find_answers(v_payment) as i));
    v_counts := v_counts || jsonb_build_object('idempotency_keys', v_count);
    update surety.calls set request = '{}' where payment_id = p_payment_id and request <> '{}';
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('calls', v_count);
    update surety.refunds set metadata = '{}' where payment_id = p_payment_id and metadata <> '{}';
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('refunds', v_count);
    update surety.disputes set evidence = '{}', evidence_failure = null
    where payment_id = p_payment_id and (evidence <> '{}' or evidence_failure is not null);
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('disputes', v_count);
    update outbox.dead_letters as d set attempts = surety.replace_words(d.attempts, v_words)
    where d.payment_id = p_payment_id and d.attempts <> surety.replace_words(d.attempts, v_words);
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('dead_letters', v_count);
    v_count := surety.delete_rejected_webhooks(
        v_payment.customer ->> 'email', v_payment.customer ->> 'name',
        array_remove(array[p_payment_id, v_payment.provider_id], null)
        || array(
            select f.object_id from surety.facts as f where f.payment_id = p_payment_id and length(f.object_id) > 8));
    v_counts := v_counts || jsonb_build_object('rejected_webhooks', v_count);
    -- The mandate is the proof of consent for later charges, so a method keeps it as long as it can be charged.
    update surety.payment_methods set mandate = '{}', fingerprint = null
    where payment_id = p_payment_id and detached_at is not null and (mandate <> '{}' or fingerprint is not null);
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('payment_methods', v_count);
    update surety.payments as p
    set customer = null, description = null, metadata = '{}',
        return_url = surety.address_without_query(p.return_url),
        save_method = case when p.save_method is not null then p.save_method - 'mandate' end
    where p.id = p_payment_id and (
        p.customer is not null or p.description is not null or p.metadata <> '{}' or p.return_url ~ '[?#]'
        or p.save_method ? 'mandate');
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('payments', v_count);
    delete from surety.payment_labels as l
    using (
        select given.name, given.value
        from jsonb_each_text(surety.label_object(v_payment.metadata, v_payment.customer, null)) as given (name, value)
    ) as old
    where (l.merchant_id, l.name, l.value, l.payment_id)
        = (v_payment.merchant_id, old.name, old.value, p_payment_id);
    get diagnostics v_count = row_count;
    update surety.erasures set ended_at = surety.time_now() where subject_id = p_payment_id and ended_at is null;
    return v_counts || jsonb_build_object('payment_labels', v_count);
end;
$$;

comment on function surety.erase_payment(text) is
'Removes a payer''s data from a payment and from its answers, calls, refunds, disputes, dead letters and labels. Returns
how many rows of which table, or {"refused": why} for a payment in progress, whose mark is taken back unless its data
were erased before. A saved method keeps its mandate as long as it can be charged.';

create or replace function surety.erase_customer(p_customer_id text, p_at timestamptz) returns jsonb
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_customer surety.customers;
    v_refused text;
    v_detached text [];
    v_counts jsonb;
    v_count bigint;
begin
    -- Waits for payments that are being stored, by the locks of their foreign keys: the next statement sees them. Later
    -- ones wait for this transaction, and are refused (surety.refuse_erased_customers).
    select c.* into v_customer from surety.customers as c where c.id = p_customer_id for update;
    select p.id || ': ' || coalesce(surety.why_not_erasable(p), 'not erased yet') into v_refused
    from surety.payment_labels as l
    join surety.payments as p on p.id = l.payment_id
    where (l.merchant_id, l.name, l.value) = (v_customer.merchant_id, 'customer.id', p_customer_id) and (
        surety.why_not_erasable(p) is not null
        or not exists (select from surety.erasures as e where e.subject_id = p.id))
    order by p.id
    limit 1;
    if found then
        delete from surety.erasures as e where e.subject_id = p_customer_id and e.ended_at is null;
        return jsonb_build_object('refused', v_refused);
    end if;
    v_count := surety.delete_rejected_webhooks(
        v_customer.email, v_customer.name, array_remove(array[p_customer_id, v_customer.provider_id], null));
    v_counts := jsonb_build_object('rejected_webhooks', v_count);
    v_detached := array(
        select m.id from surety.payment_methods as m
        where m.customer_id = p_customer_id and m.detached_at is null
        order by m.id
    );
    v_count := surety.erase_answers(array(
        select i from surety.customers as c
        -- api.complete_command keeps the customer's id with the answers about it and its payment methods.
        join surety.idempotency_keys as i on i.merchant_id = c.merchant_id and i.payment_id = c.id
        where c.id = p_customer_id
    ));
    v_counts := v_counts || jsonb_build_object('idempotency_keys', v_count);
    update surety.payment_methods
    set mandate = '{}', fingerprint = null, detached_at = coalesce(detached_at, p_at)
    where customer_id = p_customer_id and (mandate <> '{}' or fingerprint is not null or detached_at is null);
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('payment_methods', v_count);
    -- The proof of consent is kept for two years after its revocation, as the rules of ACH ask.
    update surety.payer_accounts
    set holder_name = null, sealed_number = null, key_id = null, fingerprint = null,
        removed_at = coalesce(removed_at, p_at), mandate_revoked_at = coalesce(mandate_revoked_at, p_at)
    where customer_id = p_customer_id and (sealed_number is not null or holder_name is not null);
    get diagnostics v_count = row_count;
    v_counts := v_counts || jsonb_build_object('payer_accounts', v_count);
    -- No worker passes this on: the provider has requests of its own for erasures.
    update surety.customers
    set email = null, folded_email = null, name = null, phone = null, description = null, shipping = null,
        metadata = '{}', provider_failure = null, version = version + 1, provider_version = version + 1,
        erased_at = p_at, updated_at = p_at
    where id = p_customer_id and erased_at is null
    returning * into v_customer;
    get diagnostics v_count = row_count;
    -- A worker detaches the methods at the provider.
    update surety.erasures set ended_at = p_at where subject_id = p_customer_id and ended_at is null;
    perform surety.emit_method_event(v_customer, d.id, 'customer.payment_method_detached', p_at)
    from unnest(v_detached) as d (id);
    if v_count > 0 then
        perform surety.emit_customer_event(v_customer, 'customer.updated', p_at);
    end if;
    return v_counts || jsonb_build_object('customers', v_count);
end;
$$;

comment on function surety.erase_customer(text, timestamptz) is
'Removes a customer''s data, and detaches its saved payment methods, with events about both. Its payments are erased by
surety.erase_payment before. Returns how many rows of which table, or {"refused": "id: why"} for a customer that has a
payment in progress, or one that is not erased. The mark of a
refused customer is taken back.';
