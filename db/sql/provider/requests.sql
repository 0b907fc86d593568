-- Requests to providers: their parameters and their rate.

create or replace function surety.stripe_request(p_payment surety.payments, p_operation text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_strip_nulls(case
        -- Created unconfirmed: creating an intent charges nothing.
        when p_operation = 'create' then jsonb_build_object(
            'amount', p_payment.amount_minor,
            'currency', p_payment.currency,
            'payment_method', p_payment.method_token,
            'customer', (select customers.provider_id from surety.customers where customers.id = p_payment.customer_id),
            'setup_future_usage', p_payment.save_method ->> 'usage',
            'automatic_payment_methods', jsonb_build_object('enabled', true, 'allow_redirects', 'never'),
            'allowed_payment_method_types', jsonb_build_array('card'),
            'capture_method', case p_payment.capture_method when 'manual' then 'manual' else 'automatic_async' end,
            'description', p_payment.description,
            'statement_descriptor_suffix', p_payment.statement_descriptor_suffix,
            'receipt_email', p_payment.customer ->> 'email',
            'metadata', jsonb_build_object(
                'surety_payment', p_payment.id,
                'surety_environment', (select environment.id from surety.environment),
                -- So that a fact of the intent shows whether its payer can act by script.
                'surety_authentication', case when p_payment.authentication = 'script' then 'script' end,
                -- An intent for a payment method that exists has no field of its own for a name.
                'customer_name', p_payment.customer ->> 'name'
            )
        )
        when p_operation = 'confirm' then jsonb_build_object(
            -- Its charge says which card was used.
            'expand', jsonb_build_array('latest_charge'),
            'return_url', p_payment.return_url,
            'use_stripe_sdk', case when p_payment.authentication = 'script' then true end,
            -- An absent payer can't act: an attempt that needs an action fails.
            'off_session', case when p_payment.off_session then true end,
            'mandate_data', case when p_payment.save_method is not null then jsonb_build_object(
                'customer_acceptance', jsonb_build_object(
                    'type', 'online',
                    'accepted_at',
                    extract(epoch from (p_payment.save_method -> 'mandate' ->> 'accepted_at')::timestamptz)::bigint,
                    'online', jsonb_build_object(
                        'ip_address', p_payment.save_method -> 'mandate' -> 'ip_address',
                        'user_agent', p_payment.save_method -> 'mandate' -> 'user_agent'
                    )
                )
            ) end
        )
        when p_operation = 'capture' then jsonb_build_object(
            'amount_to_capture', (select requested.amount_minor from surety.pending_capture(p_payment.id) as requested)
        )
        when p_operation = 'cancel' then jsonb_build_object(
            'cancellation_reason',
            case when p_payment.flags ? 'cancel_requested_at' then 'requested_by_customer' else 'abandoned' end
        )
        when p_operation like 'cancel:%' then jsonb_build_object('cancellation_reason', 'duplicate')
    end);
end;

comment on function surety.stripe_request(surety.payments, text) is
'The parameters of an operation on a payment''s intent, as Stripe names them; null for an unknown operation.';

create or replace function surety.stripe_refund_request(p_refund surety.refunds, p_intent_id text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_strip_nulls(jsonb_build_object(
        'payment_intent', p_intent_id,
        'amount', p_refund.amount_minor,
        'reason', p_refund.reason,
        'metadata', jsonb_build_object(
            'surety_refund', p_refund.id,
            'surety_payment', p_refund.payment_id,
            'surety_environment', (select environment.id from surety.environment)
        )
    ));
end;

comment on function surety.stripe_refund_request(surety.refunds, text) is
'The parameters of a refund, as Stripe names them.';

create or replace function surety.stripe_evidence_request(p_dispute surety.disputes) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_build_object(
        'evidence', p_dispute.evidence, 'submit', p_dispute.submit_asked_at is not null
    );
end;

comment on function surety.stripe_evidence_request(surety.disputes) is
'All evidence given so far for a dispute, as Stripe names its parameters.';

create or replace function surety.reserve_request_slots(
    p_provider text, p_account text, p_per_second double precision, p_is_urgent boolean, p_count integer
) returns double precision[]
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- GCRA in one statement: each request moves next_at on by its share of a second; next_at lags by half a second at
    -- most, which is the burst. Requests that aren't urgent take slots only if they need not wait. The backlog is cut
    -- to one minute, so a clock that was set back can't stop all requests.
    with taken as (
        insert into surety.request_slots as paces (provider, account, next_at)
        values (
            p_provider, p_account,
            surety.time_now() - interval '500 milliseconds' + make_interval(secs => p_count / p_per_second)
        )
        on conflict (provider, account) do update
        set next_at = greatest(
            least(paces.next_at, surety.time_now() + interval '1 minute'),
            surety.time_now() - interval '500 milliseconds'
        ) + make_interval(secs => p_count / p_per_second)
        where p_is_urgent or paces.next_at < surety.time_now() - interval '250 milliseconds'
        returning extract(epoch from paces.next_at - surety.time_now())::double precision as seconds
    )

    select array_agg(greatest(0, taken.seconds - (p_count - slot.n) / p_per_second) order by slot.n)
    from taken, generate_series(1, p_count) as slot (n);
end;

comment on function surety.reserve_request_slots(text, text, double precision, boolean, integer) is
'Reserves slots for some requests to a provider''s account. Returns the seconds to wait before sending each; null when
the requests aren''t urgent and would have to wait, so that no slot was taken.';
