-- What an erasure would change, for its dry run: counted by a reader that locks and marks nothing.

create or replace function surety.count_erasable_events(p_subject_ids text[], p_after text) returns bigint
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select count(*)
    from surety.provider_events
    cross join lateral surety.parse_event(provider_events.body) as parsed (event)
    where
        provider_events.id > p_after
        and surety.is_about_erased(provider_events.provider, provider_events.account, parsed.event, p_subject_ids)
        and surety.redact_json(parsed.event)::text <> provider_events.body;
end;

comment on function surety.count_erasable_events(text[], text) is
'The number of stored provider''s events after an id that hold data of these payments and customers.';

create or replace function surety.count_erasable_rows(p_payment_ids text[], p_customer_ids text[]) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with answers as (
        select
            found.merchant_id,
            found.route,
            found.key,
            found.response
        from surety.payments
        cross join lateral surety.find_answers(payments) as found
        where payments.id = any(p_payment_ids)
        union
        select
            idempotency_keys.merchant_id,
            idempotency_keys.route,
            idempotency_keys.key,
            idempotency_keys.response
        from surety.customers
        inner join surety.idempotency_keys
            on
                customers.merchant_id = idempotency_keys.merchant_id
                and customers.id = idempotency_keys.payment_id
        where customers.id = any(p_customer_ids)
    ),

    webhooks as (
        select unnest(surety.find_rejected_webhooks(
            payments.customer ->> 'email', payments.customer ->> 'name',
            array[payments.id, payments.provider_id] || array(
                select facts.object_id
                from surety.facts
                where facts.payment_id = payments.id and length(facts.object_id) > 8
            )
        )) as id
        from surety.payments
        where payments.id = any(p_payment_ids)
        union
        select unnest(surety.find_rejected_webhooks(
            customers.email, customers.name, array[customers.id, customers.provider_id]
        ))
        from surety.customers
        where customers.id = any(p_customer_ids)
    )

    select jsonb_build_object(
        'idempotency_keys',
        (
            select count(*)
            from answers
            where
                answers.response like '{%'
                and answers.response::jsonb <> surety.redact_answer(answers.response)::jsonb
        ),
        'calls',
        (select count(*) from surety.calls where calls.payment_id = any(p_payment_ids) and calls.request <> '{}'),
        'refunds',
        (
            select count(*) from surety.refunds
            where refunds.payment_id = any(p_payment_ids) and refunds.metadata <> '{}'
        ),
        'disputes',
        (
            select count(*) from surety.disputes
            where
                disputes.payment_id = any(p_payment_ids)
                and (disputes.evidence <> '{}' or disputes.evidence_failure is not null)
        ),
        'dead_letters',
        (
            select count(*)
            from outbox.dead_letters
            inner join surety.payments on dead_letters.payment_id = payments.id
            where
                payments.id = any(p_payment_ids)
                and dead_letters.attempts <> surety.replace_words(
                    dead_letters.attempts, surety.words_of_payer(payments)
                )
        ),
        'rejected_webhooks',
        (select count(*) from webhooks),
        'payment_methods',
        (
            select count(*) from surety.payment_methods
            where
                (
                    payment_methods.customer_id = any(p_customer_ids)
                    or (payment_methods.payment_id = any(p_payment_ids) and payment_methods.detached_at is not null)
                )
                and (
                    payment_methods.mandate <> '{}' or payment_methods.fingerprint is not null
                    or payment_methods.detached_at is null
                )
        ),
        'payer_accounts',
        (
            select count(*) from surety.payer_accounts
            where
                payer_accounts.customer_id = any(p_customer_ids)
                and (payer_accounts.sealed_number is not null or payer_accounts.holder_name is not null)
        ),
        'payments',
        (
            select count(*) from surety.payments
            where
                payments.id = any(p_payment_ids)
                and (
                    payments.customer is not null or payments.description is not null or payments.metadata <> '{}'
                    or payments.return_url ~ '[?#]' or payments.save_method ? 'mandate'
                )
        ),
        'payment_labels',
        (
            select count(*)
            from surety.payments
            cross join lateral jsonb_each_text(surety.label_object(payments.metadata, payments.customer, null))
            where payments.id = any(p_payment_ids)
        ),
        'customers',
        (select count(*) from surety.customers where customers.id = any(p_customer_ids) and customers.erased_at is null)
    );
end;

comment on function surety.count_erasable_rows(text[], text[]) is
'How many rows of which table surety.erase_payment and surety.erase_customer would change for these payments and
customers.';
