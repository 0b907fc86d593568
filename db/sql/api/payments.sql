-- Payments: create, read, list.
--
-- Every function takes the SHA-256 of the API key and finds the merchant itself, so that no caller can name one.
-- Expected refusals are rows, not exceptions.

create or replace function api.check_amount_bounds(p_amount bigint, p_currency text) returns jsonb
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        case
            when currencies.currency is null
                then jsonb_build_object('field', '/currency', 'rule', 'known', 'given', p_currency)
            when p_amount < currencies.minimum_minor
                then jsonb_build_object(
                    'field', '/amount', 'rule', 'minimum', 'limit', currencies.minimum_minor, 'given', p_amount,
                    'currency', p_currency)
            when p_amount > currencies.maximum_minor
                then jsonb_build_object(
                    'field', '/amount', 'rule', 'maximum', 'limit', currencies.maximum_minor, 'given', p_amount,
                    'currency', p_currency)
            when p_amount % currencies.step_minor <> 0
                then jsonb_build_object(
                    'field', '/amount', 'rule', 'multiple', 'limit', currencies.step_minor, 'given', p_amount,
                    'currency', p_currency)
        end
    from (values (p_currency)) as asked (currency)
    left join surety.currencies on asked.currency = currencies.currency;
end;

comment on function api.check_amount_bounds(bigint, text) is
'The rule of its currency that an amount in minor units breaks: {field, rule, limit, given, currency}; null if none. The
rule is known, minimum, maximum or multiple.';

create or replace function api.check_part(p_amount bigint, p_maximum bigint, p_currency text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        jsonb_build_object(
            'field', '/amount', 'rule', broken.rule, 'limit', broken.bound, 'given', p_amount, 'currency', p_currency
        )
    from surety.currencies
    cross join lateral (
        select
            case
                when p_amount < 1 then 'minimum'
                when p_amount > p_maximum then 'maximum'
                when p_amount % currencies.step_minor <> 0 then 'multiple'
            end as rule,
            case when p_amount < 1 then 1 when p_amount > p_maximum then p_maximum else currencies.step_minor end
                as bound
    ) as broken
    where currencies.currency = p_currency and broken.rule is not null;
end;

comment on function api.check_part(bigint, bigint, text) is
'The rule that a part of a payment breaks, as for api.check_amount_bounds: a capture or refund of p_amount, at most
p_maximum, in minor units; null if none.';

create or replace function api.whole_steps(p_amount bigint, p_currency text) returns bigint
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select p_amount - p_amount % currencies.step_minor from surety.currencies where currencies.currency = p_currency;
end;

comment on function api.whole_steps(bigint, text) is
'The largest amount up to p_amount that the provider accepts in this currency, in minor units.';

create or replace function api.new_payment(
    p_id text, p_merchant_id text, p_amount_minor bigint, p_currency text, p_rail text, p_capture_method text,
    p_method_token text, p_reference text, p_description text, p_statement_descriptor_suffix text, p_return_url text,
    p_off_session boolean, p_customer jsonb, p_metadata jsonb, p_provider text, p_provider_account text,
    p_livemode boolean, p_created_at timestamptz, p_customer_id text, p_saved_method_id text, p_save_method jsonb,
    p_authentication text
) returns surety.payments
language sql immutable parallel safe
begin atomic
    -- Columns in the table's order. PostgreSQL inlines the expression.
    select (
        p_id, p_merchant_id, 1, 'initiated', p_amount_minor, p_currency, 0, 0, 0, 0, 0, p_rail, p_capture_method,
        p_method_token, p_reference, p_description, p_statement_descriptor_suffix, p_return_url, p_off_session,
        p_customer, p_metadata, p_provider, p_provider_account, p_livemode, null, null, null, '{}', p_created_at,
        p_created_at, null, 0, null, p_customer_id, p_saved_method_id, p_save_method, p_authentication
    )::surety.payments;
end;

comment on function api.new_payment(
    text, text, bigint, text, text, text, text, text, text, text, text, boolean, jsonb, jsonb, text, text, boolean,
    timestamptz, text, text, jsonb, text
) is
'A payment at its first step, initiated, by named arguments; not stored. p_amount_minor is in minor units of
p_currency.';

create or replace function api.new_step_entry(
    p_id text, p_at timestamptz, p_actor text, p_address text, p_request_id text, p_payment_id text,
    p_merchant_id text, p_snapshot jsonb
) returns audit.entries
language sql immutable parallel safe
begin atomic
    select (
        p_id, p_at, null, 'step', p_actor, p_address, p_request_id, p_payment_id, p_merchant_id, 1, null, 'initiated',
        'accepted', 'request', null, p_snapshot
    )::audit.entries;
end;

comment on function api.new_step_entry(text, timestamptz, text, text, text, text, text, jsonb) is
'The audit entry of a request that creates a payment and of its first step, by named arguments; not stored.';

create or replace function api.create_payments(p_requests json)
returns table (
    n integer, status smallint, problem text, detail jsonb, body text, is_replayed boolean, payment_id text
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
-- Locks: idempotency keys, references, money limits, subjects of velocity rules, each sorted; the payments are new.
-- Rows are kept in parallel arrays, because joins would cost more than all other work.
declare
    v_route constant text := 'POST /v1/payments';
    -- A merchant can be suspended, a customer erased, a payment method removed, after a request was accepted. Its
    -- repetition gets the first answer all the same.
    v_later_problems constant text [] := array['merchant-suspended', 'invalid-request'];
    v_now timestamptz := surety.time_now();
    v_cut_off text [] := surety.cut_off_accounts();
    -- One element per request.
    v_n integer [];
    v_merchants text [];
    v_idempotency_keys text [];
    v_hashes bytea [];
    v_problems text [];
    v_details jsonb [];
    v_references text [];
    v_ids text [];
    v_are_cut_off boolean [];
    v_labels jsonb [];
    -- One element per request that may become a payment, ordered by key.
    v_payments surety.payments [];
    v_keys surety.idempotency_keys [];
    v_entries audit.entries [];
    v_won text [];
    v_taken text [];
    v_limits text [] := '{}';
    -- By the ids of payments: {problem, detail}, and what a velocity rule found.
    v_refusals jsonb := '{}';
    v_unpayable jsonb;
    v_traceparents jsonb;
    v_holds jsonb := '{}';
begin
    -- The merchant, as api.identify_merchant finds it, and the problem of the request, if any. Without a problem of
    -- its key, a request has a merchant.
    with given as (
        select
            r.*, k.id as key_id, m.id as merchant_id, m.provider_account, m.livemode,
            s.customer_id as customer_of_method, s.provider_id as saved_token,
            surety.new_id('pay', v_now) as new_id,
            case
                when k.id is null then 'unauthenticated'
                when k.problem is not null then k.problem
                when m.suspended_at is not null then 'merchant-suspended'
                when c.currency is null or r.amount not between c.minimum_minor and c.maximum_minor
                    or r.amount % c.step_minor <> 0
                    then 'invalid-request'
            end as problem,
            case
                when r.customer_id is not null or r.saved_method is not null
                    then api.check_customer(m.id, r.customer_id, r.saved_method, v_now)
            end as broken_rule
        from json_to_recordset(p_requests) as r (
            n integer, key_hash text, request_id text, address text, api_version text, idempotency_key text,
            request_hash text, amount bigint, currency text, rail text, method_token text, capture_method text,
            reference text, description text, statement_descriptor_suffix text, return_url text, off_session boolean,
            customer jsonb, metadata jsonb, customer_id text, saved_method text, save_method jsonb,
            authentication text, traceparent text
        )
        left join lateral (
            select
                a.id, a.merchant_id,
                api.find_key_problem(
                    a.revoked_at, a.expires_at, a.networks, a.scopes, 'payments:write', r.address, v_now) as problem
            from surety.api_keys as a
            where a.hash = decode(r.key_hash, 'hex')
        ) as k on true
        left join surety.merchants as m on m.id = k.merchant_id and k.problem is null
        left join surety.currencies as c on c.currency = r.currency
        left join surety.payment_methods as s on s.id = r.saved_method and s.merchant_id = m.id
    ),
    asked as (
        select
            g.*,
            -- Requests of one batch can share an Idempotency-Key: the first admissible one runs, the others replay it.
            g.problem is null and 1 = row_number() over (
                partition by g.merchant_id, g.idempotency_key, g.problem is null order by g.n) as is_first,
            api.new_payment(
                p_id => g.new_id, p_merchant_id => g.merchant_id, p_amount_minor => g.amount, p_currency => g.currency,
                p_rail => g.rail, p_capture_method => g.capture_method,
                p_method_token => coalesce(g.saved_token, g.method_token),
                p_reference => g.reference, p_description => g.description,
                p_statement_descriptor_suffix => g.statement_descriptor_suffix, p_return_url => g.return_url,
                p_off_session => coalesce(g.off_session, false), p_customer => g.customer,
                p_metadata => coalesce(g.metadata, '{}'),
                p_provider => 'stripe', p_provider_account => g.provider_account, p_livemode => g.livemode,
                p_created_at => v_now, p_customer_id => coalesce(g.customer_id, g.customer_of_method),
                p_saved_method_id => g.saved_method, p_save_method => g.save_method,
                p_authentication => coalesce(g.authentication, 'redirect')
            ) as payment
        from given as g
        order by g.merchant_id, g.idempotency_key, g.n
    )
    select
        array_agg(a.n), array_agg(a.merchant_id), array_agg(a.idempotency_key),
        array_agg(decode(a.request_hash, 'hex')), array_agg(a.problem),
        array_agg(case
            when a.problem = 'invalid-request' then api.check_amount_bounds(a.amount, a.currency)
        end),
        array_agg(a.reference), array_agg(case when a.is_first then a.new_id end),
        array_agg(coalesce(a.provider_account = any(v_cut_off), false)),
        array_agg(case
            when a.is_first and a.broken_rule is null
                and (a.metadata is not null or a.customer is not null or (a.payment).customer_id is not null)
                then surety.label_object(a.metadata, a.customer, (a.payment).customer_id)
        end),
        array_agg(a.payment) filter (where a.is_first),
        array_agg((
            a.merchant_id, v_route, a.idempotency_key, decode(a.request_hash, 'hex'), a.new_id, 201,
            shown.document::text, v_now
        )::surety.idempotency_keys) filter (where a.is_first),
        array_agg(api.new_step_entry(
            p_id => surety.new_id('aud', v_now), p_at => v_now, p_actor => 'key:' || a.key_id,
            p_address => a.address, p_request_id => a.request_id, p_payment_id => a.new_id,
            p_merchant_id => a.merchant_id,
            p_snapshot => jsonb_build_object(
                'route', v_route, 'api_version', a.api_version, 'idempotency_key', a.idempotency_key,
                'amount', a.amount, 'currency', a.currency)
        )) filter (where a.is_first),
        coalesce(
            jsonb_object_agg(a.new_id, jsonb_build_object('problem', 'invalid-request', 'detail', a.broken_rule))
            filter (where a.is_first and a.broken_rule is not null), '{}'),
        jsonb_object_agg(a.new_id, a.traceparent) filter (where a.traceparent is not null)
    into
        v_n, v_merchants, v_idempotency_keys, v_hashes, v_problems, v_details, v_references, v_ids,
        v_are_cut_off, v_labels, v_payments, v_keys, v_entries, v_unpayable, v_traceparents
    from asked as a cross join lateral api.show_payment(a.payment) as shown;

    if v_payments is not null then
        -- A reference in use, an account that is cut off, or a payment method that was removed refuses the request: its
        -- key must not be kept, as nothing took effect. All are decided behind the key, so that a repetition gets its
        -- first answer.
        with keyed as (
            insert into surety.idempotency_keys as i (
                merchant_id, route, key, request_hash, payment_id, status, response, created_at
            )
            select
                k.merchant_id, k.route, k.key, k.request_hash, k.payment_id, k.status, k.response, k.created_at
            from unnest(v_keys) as k
            on conflict (merchant_id, route, key) do nothing
            returning i.payment_id
        ),
        won as materialized (
            select array_agg(k.payment_id) as ids from keyed as k
        ),
        wanted as materialized (
            select p.merchant_id, p.reference, p.id
            from won cross join unnest(v_payments) as p
            where p.reference is not null and p.id = any(won.ids) and p.provider_account <> all(v_cut_off)
                and not v_unpayable ? p.id
        ),
        referred as (
            insert into surety.payment_references as r (merchant_id, reference, payment_id)
            select w.merchant_id, w.reference, w.id from wanted as w
            order by w.merchant_id, w.reference, w.id
            on conflict (merchant_id, reference) do nothing
            returning r.payment_id
        )
        select
            (select w.ids from won as w),
            (select array_agg(w.id) from wanted as w where w.id not in (select r.payment_id from referred as r))
        into v_won, v_taken;
        if v_unpayable <> '{}' then
            v_taken := nullif(array(select w.id from unnest(v_won) as w (id) where v_unpayable ? w.id), '{}')
                || v_taken;
        end if;
        if v_cut_off <> '{}' then
            v_taken := nullif(v_taken || array(
                select p.id from unnest(v_payments) as p
                where p.id = any(v_won) and p.provider_account = any(v_cut_off)
            ), '{}');
        end if;
        v_limits := surety.list_limits(v_merchants);
        if v_limits <> '{}' then
            select j.refusals, j.holds into v_refusals, v_holds
            from surety.judge_new_payments(
                array(
                    select p
                    from unnest(v_n, v_ids) as a (n, id) join unnest(v_payments) as p on p.id = a.id
                    where p.id = any(v_won) and p.id <> all(coalesce(v_taken, '{}')) and surety.is_limited(p, v_limits)
                    order by p.merchant_id, p.currency, a.n
                ), v_now) as j;
            if v_refusals <> '{}' then
                delete from surety.payment_references as r using unnest(v_payments) as p
                where v_refusals ? p.id
                    and (r.merchant_id, r.reference, r.payment_id) = (p.merchant_id, p.reference, p.id);
                v_taken := coalesce(v_taken, '{}') || array(select jsonb_object_keys(v_refusals));
            end if;
        end if;
        v_refusals := v_refusals || v_unpayable;
        if v_taken is not null then
            delete from surety.idempotency_keys as i
            using unnest(v_keys) as k
            where k.payment_id = any(v_taken)
                and i.merchant_id = k.merchant_id and i.route = k.route and i.key = k.key;
            v_won := array(select w.id from unnest(v_won) as w (id) where w.id <> all(v_taken));
        end if;
        if cardinality(v_won) is distinct from cardinality(v_payments) then
            v_payments := array(select p from unnest(v_payments) as p where p.id = any(v_won));
            v_entries := array(select e from unnest(v_entries) as e where e.payment_id = any(v_won));
        end if;
        if v_holds <> '{}' then
            v_payments := api.hold_new_payments(v_payments, v_keys, v_holds, v_now);
        end if;

        if v_traceparents is not null then
            perform outbox.keep_traceparents(v_traceparents);
        end if;
        with paid as (
            insert into surety.payments
            select p.* from unnest(v_payments) as p
        ),
        stepped as (
            insert into surety.steps (payment_id, version, from_state, to_state, cause, at, actor, request_id)
            select e.payment_id, 1, null, 'initiated', 'request', v_now, e.actor, e.request_id
            from unnest(v_entries) as e
        )
        -- The request and the first step share one audit entry.
        insert into audit.entries (
            id, at, kind, actor, address, request_id, payment_id, merchant_id, version, to_state, outcome, reason,
            snapshot
        )
        select
            e.id, e.at, e.kind, e.actor, e.address, e.request_id, e.payment_id, e.merchant_id, e.version, e.to_state,
            e.outcome, e.reason, e.snapshot
        from unnest(v_entries) as e;
        if v_holds <> '{}' then
            perform surety.open_holds(v_holds, v_now);
        end if;
        -- A new money limit waits for the payments stored here, by their merchants' rows (surety.set_money_limit).
        -- One that was set before them is found here: the batch is repeated, and judged by it.
        if exists (
            select from surety.money_limits as l
            where l.merchant_id = any(v_merchants) and l.merchant_id || ':' || l.currency <> all(v_limits)
        ) then
            raise exception 'a money limit was set meanwhile' using errcode = 'serialization_failure';
        end if;
    end if;

    if array_remove(v_labels, null) <> '{}' then
        perform surety.refuse_erased_customers(v_labels);
        insert into surety.payment_labels (merchant_id, name, value, payment_id)
        select a.merchant_id, l.key, l.value, a.id
        from unnest(v_merchants, v_ids, v_labels) as a (merchant_id, id, labels)
        cross join lateral jsonb_each_text(a.labels) as l
        where a.id = any(v_won);
    end if;

    if cardinality(v_won) = cardinality(v_n) and v_holds = '{}' then
        -- All payments are new: the arrays hold the same requests in the same order.
        return query
        select a.n, a.status, null::text, null::jsonb, a.response, false, a.payment_id
        from rows from (unnest(v_n), unnest(v_keys)) as a (
            n, merchant_id, route, key, request_hash, payment_id, status, response, created_at
        )
        order by a.n;
        return;
    end if;

    -- A batch of replays only reads: its commit would not wait for a standby.
    if array_position(v_problems, null) is not null or v_problems && v_later_problems then
        perform surety.await_standbys();
    end if;
    -- A new statement: only its snapshot includes the rows of transactions that the insert waited for.
    return query
    select
        a.n,
        case when i.request_hash = a.request_hash then i.status end,
        case
            when a.problem is not null and i.request_hash is distinct from a.request_hash then a.problem
            -- A refused request stores no key, but its hash still binds later requests of the batch.
            when coalesce(i.request_hash, first_value(a.request_hash) over same_key) <> a.request_hash
                then 'idempotency-key-reused'
            when i.key is null
                then case
                    when a.is_cut_off then 'provider-account-refused'
                    else coalesce(
                        v_refusals #>> array[first_value(a.new_id) over same_key, 'problem'], 'reference-taken')
                end
        end,
        case
            when a.problem is not null and i.request_hash is distinct from a.request_hash then a.detail
            when i.key is null and not a.is_cut_off and first_value(a.request_hash) over same_key = a.request_hash
                then coalesce(
                    v_refusals #> array[first_value(a.new_id) over same_key, 'detail'],
                    jsonb_build_object('payment_id', t.payment_id))
        end,
        case when i.request_hash = a.request_hash then i.response end,
        i.request_hash = a.request_hash and i.payment_id is distinct from a.new_id,
        i.payment_id
    from unnest(
        v_n, v_merchants, v_idempotency_keys, v_hashes, v_problems, v_details, v_references, v_ids, v_are_cut_off
    ) as a (n, merchant_id, idempotency_key, request_hash, problem, detail, reference, new_id, is_cut_off)
    -- offset 0 forces index look-ups: a plan cached while the tables were small would scan them completely.
    left join lateral (
        select k.key, k.request_hash, k.status, k.response, k.payment_id
        from surety.idempotency_keys as k
        where (a.problem is null or a.problem = any(v_later_problems))
            and k.merchant_id = a.merchant_id and k.route = v_route and k.key = a.idempotency_key
        offset 0
    ) as i on true
    left join lateral (
        select r.payment_id
        from surety.payment_references as r
        where i.key is null and r.merchant_id = a.merchant_id and r.reference = a.reference
        offset 0
    ) as t on true
    window same_key as (partition by a.merchant_id, a.idempotency_key, a.problem is null order by a.n)
    order by a.n;
end;
$$;

comment on function api.create_payments(json) is
'Creates the payments of a batch of requests in one transaction; one row for each request, found by n.
201 and the new payment''s document, or with is_replayed the first answer, byte for byte. Problems: those of
api.explain_denial; merchant-suspended
(suspended); provider-account-refused (surety.cut_off_accounts); invalid-request, detail {field, rule, limit,
given}; reference-taken, detail {payment_id}; limit-exceeded, velocity-exceeded (surety.judge_new_payments);
idempotency-key-reused. p_requests: [{n, key_hash (hex), request_id, address, idempotency_key, request_hash (hex),
amount (minor units), currency, rail, method_token, capture_method, reference, description, statement_descriptor_suffix,
return_url, off_session, customer, metadata, customer_id, saved_method, save_method {usage, mandate}, authentication
(by default redirect), traceparent}]. Without customer_id, the customer is that of saved_method.';
