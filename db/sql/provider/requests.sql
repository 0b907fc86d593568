-- Requests to providers: their parameters and their pace.

create or replace function surety.stripe_request(p_payment surety.payments, p_operation text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- Parameters as Stripe names them. The intent is created unconfirmed: nothing can be charged by creating it.
    select jsonb_strip_nulls(case p_operation
        when 'create' then jsonb_build_object(
            'amount', p_payment.amount_minor,
            'currency', p_payment.currency,
            'payment_method', p_payment.method_token,
            'automatic_payment_methods', jsonb_build_object('enabled', true, 'allow_redirects', 'never'),
            'allowed_payment_method_types', jsonb_build_array('card'),
            'capture_method', case p_payment.capture_method when 'manual' then 'manual' else 'automatic_async' end,
            'description', p_payment.description,
            'statement_descriptor_suffix', p_payment.statement_descriptor_suffix,
            'metadata', jsonb_build_object(
                'surety_payment', p_payment.id,
                'surety_environment', (select environment.id from surety.environment)
            )
        )
        when 'confirm' then jsonb_build_object('return_url', p_payment.return_url)
        when 'capture' then jsonb_build_object(
            'amount_to_capture', (select asked.amount_minor from surety.pending_capture(p_payment.id) as asked)
        )
        when 'cancel' then jsonb_build_object(
            'cancellation_reason',
            case when p_payment.flags ? 'cancel_requested_at' then 'requested_by_customer' else 'abandoned' end
        )
        else jsonb_build_object('cancellation_reason', 'duplicate')
    end);
end;

create or replace function surety.reserve_request_slot(
    p_provider text, p_account text, p_per_second double precision, p_is_urgent boolean
) returns double precision
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- GCRA in one statement: next_at moves on by one request's share of a second and may lag by half a second's worth.
    -- Who isn't urgent takes a turn only where nobody would wait for it. A minute's backlog at most is kept, so that a
    -- clock that was set back can't stop us.
    with taken as (
        insert into surety.request_slots as paces (provider, account, next_at)
        values (
            p_provider, p_account,
            surety.time_now() - interval '500 milliseconds' + make_interval(secs => 1 / p_per_second)
        )
        on conflict (provider, account) do update
        set next_at = greatest(
            least(paces.next_at, surety.time_now() + interval '1 minute'),
            surety.time_now() - interval '500 milliseconds'
        ) + make_interval(secs => 1 / p_per_second)
        where p_is_urgent or paces.next_at < surety.time_now() - interval '250 milliseconds'
        returning extract(epoch from paces.next_at - surety.time_now())::double precision as seconds
    )

    select greatest(0, taken.seconds) from taken;
end;

comment on function surety.reserve_request_slot(text, text, double precision, boolean) is
'Seconds to wait before one request may be sent to a provider''s account, its turn being taken; null where the turn was
left to urgent requests.';
