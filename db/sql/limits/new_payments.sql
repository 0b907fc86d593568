-- Money limits and velocity rules, judged in the transaction that accepts payments.
--
-- Exact under concurrency: each limit's row and each subject of a rule is locked first, in sorted order, and what was
-- accepted is read by later statements, whose snapshots have the transactions that the locks waited for.

create or replace function surety.list_limits(p_merchant_ids text[]) returns text[]
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        array(
            select money_limits.merchant_id || ':' || money_limits.currency
            from surety.money_limits
            where money_limits.merchant_id = any(p_merchant_ids)
        )
        || array(
            select distinct coalesce(velocity_rules.merchant_id, '*')
            from surety.velocity_rules
            where
                velocity_rules.removed_at is null
                and (velocity_rules.merchant_id is null or velocity_rules.merchant_id = any(p_merchant_ids))
        );
end;

comment on function surety.list_limits(text[]) is
'What limits the payments of these merchants: merchant:currency for each money limit, the merchant for its velocity
rules, * for rules of each merchant.';

create or replace function surety.is_limited(p_payment surety.payments, p_limits text[]) returns boolean
language sql immutable parallel safe
begin atomic
    select p_payment.merchant_id || ':' || p_payment.currency = any(p_limits)
        or p_payment.merchant_id = any(p_limits) or '*' = any(p_limits);
end;

comment on function surety.is_limited(surety.payments, text[]) is
'Whether one of the limits that surety.list_limits returns applies to a payment.';

create or replace function surety.fingerprint_of_method(p_method_id text) returns text
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select payment_methods.fingerprint from surety.payment_methods where payment_methods.id = p_method_id;
end;

comment on function surety.fingerprint_of_method(text) is
'The fingerprint of a saved payment method''s card; null if there is none, or it is erased.';

create or replace function surety.velocity_subject(p_subject text, p_payment surety.payments) returns text
language sql stable
begin atomic
    -- A branch that is not taken costs nothing.
    select case p_subject
        when 'email' then surety.fold_email(p_payment.customer ->> 'email')
        when 'customer' then p_payment.customer_id
        when 'card' then surety.fingerprint_of_method(p_payment.saved_method_id)
    end;
end;

comment on function surety.velocity_subject(text, surety.payments) is
'The value of a velocity rule''s subject in a payment; null if it has none, so that the rule does not apply. The card of
a new token is not known yet.';

create or replace function surety.find_payments_of_card(p_merchant_id text, p_fingerprint text, p_from text)
returns table (amount_minor bigint, currency text)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    -- Through the customers of the card's methods, whose payments are found by their label.
    select
        payments.amount_minor,
        payments.currency
    from surety.payment_methods
    inner join surety.payment_labels
        on
            payment_methods.merchant_id = payment_labels.merchant_id
            and payment_labels.name = 'customer.id'
            and payment_methods.customer_id = payment_labels.value
    inner join surety.payments
        on
            payment_labels.payment_id = payments.id
            and (payment_methods.id = payments.saved_method_id or payment_methods.payment_id = payments.id)
    where
        payment_methods.merchant_id = p_merchant_id and payment_methods.fingerprint = p_fingerprint
        and payment_labels.payment_id >= p_from;
end;

comment on function surety.find_payments_of_card(text, text, text) is
'A merchant''s payments from an id on that are known to be by one card: those by a saved payment method of it, removed
ones included, and those that saved one.';

create or replace function surety.lock_limits(p_payments surety.payments[], p_day date) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_limit record;
    v_key bigint;
begin
    for v_limit in
        select l.merchant_id, l.currency
        from surety.money_limits as l
        where (l.merchant_id, l.currency) in (select p.merchant_id, p.currency from unnest(p_payments) as p)
        order by l.merchant_id, l.currency
        for no key update
    loop
        if not exists (
            select from surety.accepted_money as a
            where a.merchant_id = v_limit.merchant_id and a.currency = v_limit.currency and a.day = p_day
        ) then
            insert into surety.accepted_money (merchant_id, currency, day, payments, amount_minor)
            select v_limit.merchant_id, v_limit.currency, p_day, c.payments, c.amount_minor
            from surety.count_accepted_money(v_limit.merchant_id, v_limit.currency, p_day) as c;
        end if;
    end loop;
    for v_key in
        select distinct hashtextextended(concat_ws(' ', 'velocity', p.merchant_id, r.subject, s.value), 0) as key
        from unnest(p_payments) as p
        join surety.velocity_rules as r
            on r.removed_at is null and (r.merchant_id is null or r.merchant_id = p.merchant_id)
        cross join lateral surety.velocity_subject(r.subject, p) as s (value)
        where s.value is not null
        order by key
    loop
        perform pg_advisory_xact_lock(v_key);
    end loop;
end;
$$;

comment on function surety.lock_limits(surety.payments[], date) is
'Locks the money limits of these payments, with their counters of a day, then the subjects of velocity rules.';

create or replace function surety.find_exceeded_rule(
    p_payment surety.payments, p_accepted surety.payments[], p_now timestamptz
) returns table (rule_id text, action text, detail jsonb)
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select
        rules.id,
        rules.action,
        jsonb_build_object(
            'rule', rules.id, 'subject', rules.subject, 'exceeded', exceeded.bound, 'maximum', exceeded.maximum,
            'period_seconds', extract(epoch from rules.period)::bigint, 'currency', rules.currency
        )
    from surety.velocity_rules as rules
    cross join lateral surety.velocity_subject(rules.subject, p_payment) as subject (value)
    cross join lateral (
        select
            count(*) as payments,
            coalesce(sum(found.amount_minor), 0) as amount_minor
        from (
            select payments.amount_minor
            from surety.payment_labels
            inner join surety.payments on payment_labels.payment_id = payments.id
            where
                rules.subject <> 'card' and payment_labels.merchant_id = p_payment.merchant_id
                and payment_labels.name = case rules.subject when 'email' then 'customer.email' else 'customer.id' end
                and payment_labels.value = subject.value
                and payment_labels.payment_id >= surety.id_at('pay', p_now - rules.period)
                and (rules.currency is null or payments.currency = rules.currency)
            union all
            select by_card.amount_minor
            from surety.find_payments_of_card(
                p_payment.merchant_id, case rules.subject when 'card' then subject.value end,
                surety.id_at('pay', p_now - rules.period)
            ) as by_card
            where rules.subject = 'card' and (rules.currency is null or by_card.currency = rules.currency)
            union all
            select batch.amount_minor
            from unnest(p_accepted) as batch
            where
                batch.merchant_id = p_payment.merchant_id
                and surety.velocity_subject(rules.subject, batch) = subject.value
                and (rules.currency is null or batch.currency = rules.currency)
        ) as found
    ) as used
    cross join lateral (
        values
        ('count', rules.count_max, used.payments, 1),
        ('amount', rules.amount_max_minor, used.amount_minor, p_payment.amount_minor)
    ) as exceeded (bound, maximum, used, added)
    where
        rules.removed_at is null
        and (rules.merchant_id is null or rules.merchant_id = p_payment.merchant_id)
        and (rules.currency is null or rules.currency = p_payment.currency)
        and subject.value is not null
        and exceeded.used + exceeded.added > exceeded.maximum
    -- Refusing comes before holding.
    order by rules.action desc, rules.id asc, exceeded.bound desc
    limit 1;
end;

comment on function surety.find_exceeded_rule(surety.payments, surety.payments[], timestamptz) is
'The velocity rule that a payment would exceed, with its action; no row if none. p_accepted: payments of the same
transaction that are not stored yet. The subjects are locked by the caller.';

create or replace function surety.refuse_beyond_limit(
    p_payment_id text, p_currency text, p_day date, p_bound text, p_maximum bigint, p_used bigint
) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_build_object(p_payment_id, jsonb_build_object(
        'problem', 'limit-exceeded',
        'detail', jsonb_build_object(
            'exceeded', p_bound, 'maximum', p_maximum, 'remaining', greatest(0, p_maximum - p_used),
            'currency', p_currency, 'day', p_day,
            'resets_at', surety.format_time((p_day + 1)::timestamp at time zone 'UTC')
        )
    ));
end;

comment on function surety.refuse_beyond_limit(text, text, date, text, bigint, bigint) is
'The refusal of a payment by a money limit, with the members of the problem limit-exceeded. p_bound: count or amount.';

create or replace function surety.judge_new_payments(p_payments surety.payments[], p_now timestamptz)
returns table (refusals jsonb, holds jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
declare
    v_day constant date := (p_now at time zone 'UTC')::date;
    v_payment surety.payments;
    v_accepted surety.payments [] := '{}';
    v_has_rules boolean;
    -- The limit of the present merchant and currency, with the part in use.
    v_limit record;
    v_exceeded text;
    v_rule record;
begin
    refusals := '{}';
    holds := '{}';
    perform surety.lock_limits(p_payments, v_day);
    v_has_rules := exists (select from surety.velocity_rules as r where r.removed_at is null);
    select null::text as merchant_id, null::text as currency into v_limit;
    foreach v_payment in array p_payments loop
        if (v_payment.merchant_id, v_payment.currency) is distinct from (v_limit.merchant_id, v_limit.currency) then
            select
                v_payment.merchant_id, v_payment.currency, a.payments, a.amount_minor, l.count_max, l.amount_max_minor
            into v_limit
            from (values (1)) as once (n)
            left join surety.money_limits as l
                on l.merchant_id = v_payment.merchant_id and l.currency = v_payment.currency
            left join surety.accepted_money as a
                on a.merchant_id = l.merchant_id and a.currency = l.currency and a.day = v_day;
        end if;
        v_exceeded := case
            when v_limit.payments + 1 > v_limit.count_max then 'count'
            when v_limit.amount_minor + v_payment.amount_minor > v_limit.amount_max_minor then 'amount'
        end;
        if v_exceeded is not null then
            refusals := refusals || surety.refuse_beyond_limit(
                v_payment.id, v_payment.currency, v_day, v_exceeded,
                case v_exceeded when 'count' then v_limit.count_max else v_limit.amount_max_minor end,
                case v_exceeded when 'count' then v_limit.payments else v_limit.amount_minor end);
            continue;
        end if;
        if v_has_rules then
            select r.* into v_rule from surety.find_exceeded_rule(v_payment, v_accepted, p_now) as r;
            if v_rule.action = 'refuse' then
                refusals := refusals || jsonb_build_object(
                    v_payment.id, jsonb_build_object('problem', 'velocity-exceeded', 'detail', v_rule.detail));
                continue;
            elsif v_rule.action = 'hold' then
                holds := holds || jsonb_build_object(v_payment.id, v_rule.detail);
            end if;
            v_accepted := v_accepted || v_payment;
        end if;
        v_limit.payments := v_limit.payments + 1;
        v_limit.amount_minor := v_limit.amount_minor + v_payment.amount_minor;
    end loop;

    update surety.accepted_money as a
    set payments = a.payments + taken.payments, amount_minor = a.amount_minor + taken.amount_minor
    from (
        select p.merchant_id, p.currency, count(*) as payments, sum(p.amount_minor) as amount_minor
        from unnest(p_payments) as p
        where not refusals ? p.id
        group by p.merchant_id, p.currency
    ) as taken
    where a.merchant_id = taken.merchant_id and a.currency = taken.currency and a.day = v_day;
    return next;
end;
$$;

comment on function surety.judge_new_payments(surety.payments[], timestamptz) is
'Judges payments of a transaction before they are stored, in their order, which is by merchant and currency first.
refusals: {payment id: {problem, detail}}; holds: {payment id: detail with the rule}. Those that are not refused are
counted under their money limits.';
