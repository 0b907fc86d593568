-- Erasures: the payments and customers found, and those in progress.

create or replace function surety.find_erasable(p_merchant_id text, p_email text, p_payment_id text, p_customer_id text)
returns table (payment_ids text[], customer_ids text[], provider_ids text[])
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    with found_customers as (
        select
            customers.id,
            customers.provider_id
        from surety.customers
        where
            customers.merchant_id = p_merchant_id
            and (customers.id = p_customer_id or customers.folded_email = surety.fold_email(p_email))
    ),

    found_payments as (
        select payments.id, payments.provider_id
        from surety.payments
        where payments.id = p_payment_id and payments.merchant_id = p_merchant_id
        union
        select payments.id, payments.provider_id
        from surety.payment_labels
        inner join surety.payments on payment_labels.payment_id = payments.id
        where
            payment_labels.merchant_id = p_merchant_id
            and (
                (payment_labels.name = 'customer.email' and payment_labels.value = surety.fold_email(p_email))
                or (
                    payment_labels.name = 'customer.id'
                    and payment_labels.value in (select found_customers.id from found_customers)
                )
            )
    )

    select
        array(select found_payments.id from found_payments order by found_payments.id),
        array(select found_customers.id from found_customers order by found_customers.id),
        array(
            select named.id
            from (
                select found_payments.provider_id as id from found_payments
                union all
                select found_customers.provider_id from found_customers
            ) as named
            where named.id is not null
            order by named.id
        );
end;

comment on function surety.find_erasable(text, text, text, text) is
'A merchant''s payments and customers with an e-mail address, or one payment, or one customer with its payments; and the
ids of their objects at the provider.';

create or replace function surety.why_not_erasable(p surety.payments) returns text
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select case
        when p.state not in (
            'confirmed', 'settled', 'partially_refunded', 'refunded', 'reversed', 'failed', 'canceled'
        ) then p.state
        when exists (
            select from surety.calls where calls.payment_id = p.id and calls.answered_at is null
        ) then 'a call to the provider has no known outcome'
        when exists (
            select from surety.disputes
            inner join surety.dispute_statuses on disputes.status = dispute_statuses.status
            where disputes.payment_id = p.id and dispute_statuses.poll_after is not null
        ) then 'disputed'
        when exists (
            select from outbox.dead_letters
            where dead_letters.payment_id = p.id and dead_letters.closed_at is null
        ) then 'an open dead letter'
    end;
end;

comment on function surety.why_not_erasable(surety.payments) is
'Why a payment is in progress, so that its data are still needed; null if it is not.';
