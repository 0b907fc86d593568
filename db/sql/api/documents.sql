-- Payments, refunds, disputes and customers as the API shows them.

create or replace function api.show_payment(p surety.payments) returns table (document json)
language sql stable parallel safe
begin atomic
    -- No set clause, so that PostgreSQL can inline the function.
    select row_to_json(shown.*) from (
        select
            p.id as id,
            'payment' as object,
            p.livemode as livemode,
            surety.payment_status(states.status, p.rail) as status,
            p.state as state,
            p.version as version,
            p.amount_minor as amount,
            case when p.state = 'authorized' then p.amount_minor - p.captured_minor else 0 end as amount_capturable,
            p.captured_minor as amount_captured,
            p.refunded_minor as amount_refunded,
            p.reversed_minor as amount_reversed,
            ours.fee as fee,
            p.captured_minor - ours.fee as net,
            p.currency as currency,
            json_build_object(
                'type', p.rail, 'brand', charged.card -> 'brand', 'last4', charged.card -> 'last4',
                'country', charged.card -> 'country', 'saved', case
                    when p.save_method is null then p.saved_method_id
                    else (
                        select payment_methods.id
                        from surety.payment_methods
                        where
                            payment_methods.customer_id = p.customer_id
                            -- An earlier payment may have saved it.
                            and (payment_methods.payment_id = p.id or payment_methods.provider_id = p.method_token)
                        order by payment_methods.id
                        limit 1
                    )
                end
            ) as payment_method,
            p.capture_method as capture_method,
            case when p.state = 'authorized' then charged.card -> 'capture_before' end as capture_before,
            p.flags ? 'cancel_requested_at' as cancel_requested,
            p.flags -> 'hold' as hold,
            p.next_action as next_action,
            p.failure as failure,
            p.fraud_warning as fraud_warning,
            case when p.provider_id is not null then json_build_object('name', p.provider, 'id', p.provider_id) end
                as provider,
            p.reference as reference,
            p.description as description,
            p.statement_descriptor_suffix as statement_descriptor_suffix,
            p.return_url as return_url,
            p.off_session as off_session,
            p.authentication as authentication,
            p.customer as customer,
            p.customer_id as customer_id,
            p.save_method ->> 'usage' as save_payment_method,
            p.metadata as metadata,
            surety.format_time(p.created_at) as created_at,
            surety.format_time(p.updated_at) as updated_at
        from surety.states
        -- A payment that was just accepted has no charge: neither is looked up.
        left join lateral (
            select facts.data -> 'card' as card
            from surety.facts
            where
                facts.payment_id = p.id and p.provider_id is not null and facts.data ? 'card'
                and facts.disregarded is null
            order by facts.recorded_at desc, facts.id desc
            limit 1
        ) as charged on true
        left join lateral (
            select
                sum(
                    case split_part(transfers.credit_account, ':', 1)
                        when 'fee_revenue' then transfers.amount_minor
                        else case split_part(transfers.debit_account, ':', 1)
                            when 'fee_revenue' then -transfers.amount_minor
                            else 0
                        end
                    end
                )::bigint as fee
            from ledger.postings
            inner join ledger.transfers on postings.id = transfers.posting_id
            where postings.payment_id = p.id and p.captured_minor > 0
        ) as ours on true
        where states.state = p.state
    ) as shown;
end;

comment on function api.show_payment(surety.payments) is
'The payment as a document of the API; columns in the order of the document.';

create or replace function api.show_refund(r surety.refunds) returns table (document json)
language sql stable parallel safe
begin atomic
    select row_to_json(shown.*) from (
        select
            r.id as id,
            'refund' as object,
            r.state as status,
            r.version as version,
            r.payment_id as payment,
            r.amount_minor as amount,
            r.currency as currency,
            r.reason as reason,
            case
                when r.state = 'requires_action' then (
                    select facts.data -> 'next_action'
                    from surety.facts
                    where
                        facts.payment_id = r.payment_id and facts.object_id = r.provider_id
                        and facts.kind = 'refund_action'
                    limit 1
                )
            end as next_action,
            r.failure as failure,
            case when r.provider_id is not null then json_build_object('name', r.provider, 'id', r.provider_id) end
                as provider,
            r.metadata as metadata,
            surety.format_time(r.created_at) as created_at,
            surety.format_time(r.updated_at) as updated_at
    ) as shown;
end;

comment on function api.show_refund(surety.refunds) is
'The refund as a document of the API; columns in the order of the document.';

create or replace function api.show_dispute(d surety.disputes, p_with_texts boolean default false)
returns table (document json)
language sql stable parallel safe
begin atomic
    select row_to_json(shown.*) from (
        select
            d.id as id,
            'dispute' as object,
            d.status as status,
            d.version as version,
            d.payment_id as payment,
            d.amount_minor as amount,
            d.withdrawn_minor as amount_withdrawn,
            d.currency as currency,
            d.reason as reason,
            json_build_object(
                'due_at', surety.format_time(d.evidence_due_at),
                'given', coalesce(
                    (
                        select json_agg(given.field order by given.field)
                        from jsonb_object_keys(d.evidence) as given (field)
                    ),
                    '[]'::json
                ),
                'texts', case when p_with_texts then d.evidence end,
                'submit_asked_at', surety.format_time(d.submit_asked_at),
                'failure', d.evidence_failure
            ) as evidence,
            json_build_object('name', d.provider, 'id', d.provider_id) as provider,
            surety.format_time(d.created_at) as created_at,
            surety.format_time(d.updated_at) as updated_at
    ) as shown;
end;

comment on function api.show_dispute(surety.disputes, boolean) is
'The dispute as a document of the API; columns in the order of the document. p_with_texts: with the evidence itself.';

create or replace function api.show_customer(c surety.customers) returns table (document json)
language sql stable parallel safe
begin atomic
    select row_to_json(shown.*) from (
        select
            c.id as id,
            'customer' as object,
            c.livemode as livemode,
            c.version as version,
            c.email as email,
            c.name as name,
            c.phone as phone,
            c.description as description,
            c.shipping as shipping,
            c.metadata as metadata,
            case when c.provider_id is not null then json_build_object('name', c.provider, 'id', c.provider_id) end
                as provider,
            c.provider_failure as failure,
            surety.format_time(c.created_at) as created_at,
            surety.format_time(c.updated_at) as updated_at,
            surety.format_time(c.erased_at) as erased_at
    ) as shown;
end;

comment on function api.show_customer(surety.customers) is
'The customer as a document of the API; columns in the order of the document.';

create or replace function api.show_payment_method(m surety.payment_methods) returns table (document json)
language sql stable parallel safe
begin atomic
    select row_to_json(shown.*) from (
        select
            m.id as id,
            'payment_method' as object,
            m.customer_id as customer_id,
            m.type as type,
            m.brand as brand,
            m.last4 as last4,
            m.exp_month as exp_month,
            m.exp_year as exp_year,
            m.country as country,
            m.fingerprint as fingerprint,
            m.usage as usage,
            nullif(m.mandate, '{}') as mandate,
            m.payment_id as payment,
            json_build_object('name', 'stripe', 'id', m.provider_id) as provider,
            surety.format_time(m.created_at) as created_at,
            surety.format_time(m.detached_at) as detached_at
    ) as shown;
end;

comment on function api.show_payment_method(surety.payment_methods) is
'The saved payment method as a document of the API; columns in the order of the document.';

create or replace function api.payment_at_event(p_payment surety.payments, p_payload jsonb) returns surety.payments
language sql stable
begin atomic
    select jsonb_populate_record(
        p_payment,
        jsonb_build_object(
            'version', p_payload -> 'version', 'state', p_payload -> 'state',
            'captured_minor', coalesce(p_payload -> 'amount_captured', '0'),
            'refunded_minor', coalesce(p_payload -> 'amount_refunded', '0'),
            'reversed_minor', coalesce(p_payload -> 'amount_reversed', '0'),
            'provider_id', p_payload -> 'provider_id', 'next_action', p_payload -> 'next_action',
            'failure', p_payload -> 'failure', 'updated_at', p_payload -> 'at',
            'fraud_warning', coalesce(p_payload -> 'fraud_warning', p_payment.fraud_warning)
        )
    );
end;

comment on function api.payment_at_event(surety.payments, jsonb) is
'The payment as it was when one of its events was made, for api.show_payment: the columns that the event''s payload
carries, the others as they are.';

create or replace function api.customer_at_event(p_customer surety.customers, p_payload jsonb) returns surety.customers
language sql stable
begin atomic
    select jsonb_populate_record(
        p_customer, jsonb_build_object('version', p_payload -> 'version', 'updated_at', p_payload -> 'at'));
end;

comment on function api.customer_at_event(surety.customers, jsonb) is
'The customer for api.show_customer, with the version and time of one of its events. Its other columns are as they are,
because events hold no personal data.';

create or replace function api.method_at_event(p_method surety.payment_methods, p_type text, p_payload jsonb)
returns surety.payment_methods
language sql stable
begin atomic
    select jsonb_populate_record(
        p_method,
        jsonb_build_object(
            'detached_at', case when p_type = 'customer.payment_method_detached' then p_payload -> 'at' end
        )
    );
end;

comment on function api.method_at_event(surety.payment_methods, text, jsonb) is
'The saved payment method as it was when one of its events was made, for api.show_payment_method. An erased mandate is
not shown.';

create or replace function api.refund_at_event(p_refund surety.refunds, p_payload jsonb) returns surety.refunds
language sql stable
begin atomic
    select jsonb_populate_record(
        p_refund,
        jsonb_build_object(
            'version', p_payload -> 'version', 'state', p_payload -> 'state', 'amount_minor', p_payload -> 'amount',
            'provider_id', p_payload -> 'provider_id', 'failure', p_payload -> 'failure',
            'updated_at', p_payload -> 'at'
        )
    );
end;

comment on function api.refund_at_event(surety.refunds, jsonb) is
'The refund as it was when one of its events was made, for api.show_refund.';

create or replace function api.dispute_at_event(p_dispute surety.disputes, p_payload jsonb) returns surety.disputes
language sql stable
begin atomic
    select jsonb_populate_record(
        p_dispute,
        jsonb_build_object(
            'version', p_payload -> 'version', 'status', p_payload -> 'status',
            'withdrawn_minor', p_payload -> 'amount_withdrawn', 'updated_at', p_payload -> 'at'
        )
    );
end;

comment on function api.dispute_at_event(surety.disputes, jsonb) is
'The dispute as it was when one of its events was made, for api.show_dispute.';

create or replace function api.render_page(p_documents json[], p_limit integer) returns text
language sql immutable parallel safe
begin atomic
    select json_build_object(
        'object', 'list',
        'data', array_to_json(p_documents[1:p_limit]),
        'has_more', cardinality(p_documents) > p_limit
    )::text;
end;

comment on function api.render_page(json[], integer) is
'A page of a list: the first p_limit documents, and whether there are more. p_documents holds up to p_limit + 1.';

create or replace function api.refuse_cursor() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'starting_after is not of this list' using errcode = 'SU006';
end;
$$;

comment on function api.refuse_cursor() is
'Raises SU006: the cursor of a request is not the id of an object of the list, or no cursor of events.';
