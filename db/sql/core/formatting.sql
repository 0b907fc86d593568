-- Times and amounts as text.

create or replace function surety.format_time(p_at timestamptz) returns text
language sql stable parallel safe
begin atomic
    select to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"');
end;

comment on function surety.format_time(timestamptz) is
'A time as the API shows it: RFC 3339, in UTC, with milliseconds.';

create or replace function surety.format_amount(p_amount_minor bigint, p_currency text) returns text
language sql stable parallel safe set search_path = pg_catalog, pg_temp
begin atomic
    -- A bank may book other currencies than those that payments are accepted in.
    select coalesce(
        (
            select
                round(p_amount_minor / 10.0 ^ currencies.exponent, currencies.exponent)
                || ' ' || upper(p_currency collate "C")
            from surety.currencies
            where currencies.currency = p_currency
        ),
        p_amount_minor || ' minor units of ' || upper(p_currency collate "C")
    );
end;

comment on function surety.format_amount(bigint, text) is
'An amount in major units with its currency, for people: 49.99 USD.';

create or replace function surety.payment_status(p_status text, p_rail text) returns text
language sql immutable parallel safe
begin atomic
    select case when p_status = 'lost' and p_rail = 'ach' then 'returned' else p_status end;
end;

comment on function surety.payment_status(text, text) is
'The status of a payment as merchants see it: that of its state. A payment that is reversed was lost in a dispute, on
the ACH rail returned by the bank.';

create or replace function surety.address_without_query(p_url text) returns text
language sql immutable parallel safe
begin atomic
    select regexp_replace(p_url, '[?#].*$', '');
end;

comment on function surety.address_without_query(text) is
'A URL without its query and fragment, which may name a payer.';

create or replace function surety.replace_words(p_value jsonb, p_words text[]) returns jsonb
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
    v_text text := p_value #>> '{}';
    v_word text;
begin
    case jsonb_typeof(p_value)
        when 'object' then
            return (
                select coalesce(jsonb_object_agg(part.key, surety.replace_words(part.value, p_words)), '{}')
                from jsonb_each(p_value) as part);
        when 'array' then
            return (
                select coalesce(jsonb_agg(surety.replace_words(part.value, p_words) order by part.n), '[]')
                from jsonb_array_elements(p_value) with ordinality as part (value, n));
        when 'string' then
            foreach v_word in array p_words loop
                -- Also as JSON within the text spells it, without the quotes around it.
                v_text := replace(
                    replace(v_text, v_word, '(erased)'), regexp_replace(to_json(v_word)::text, '^"|"$', '', 'g'),
                    '(erased)');
            end loop;
            return to_jsonb(v_text);
        else
            return p_value;
    end case;
end;
$$;

comment on function surety.replace_words(jsonb, text[]) is
'A JSON value with (erased) in place of words in its texts; names of fields stay.';

create or replace function surety.label_object(
    p_metadata jsonb, p_customer jsonb, p_customer_id text
) returns jsonb
language sql immutable parallel safe
begin atomic
    -- One object, because labels_of_payment can't be a union all of both parts: PostgreSQL 18.6 can't plan calls of a
    -- stable function that is one and takes a row (findings/postgresql-inlined-union-over-row.sh).
    select
        coalesce(
            (
                select jsonb_object_agg('metadata.' || given.key, given.value)
                from jsonb_each_text(case when jsonb_typeof(p_metadata) = 'object' then p_metadata end) as given
            ),
            '{}'::jsonb
        )
        || case
            when p_customer ->> 'email' is null then '{}'::jsonb
            else jsonb_build_object('customer.email', surety.fold_email(p_customer ->> 'email'))
        end
        || case when p_customer_id is null then '{}'::jsonb else jsonb_build_object('customer.id', p_customer_id) end;
end;

comment on function surety.label_object(jsonb, jsonb, text) is
'The texts by which a merchant finds a payment, {name: value}: its metadata, the payer''s e-mail address as it
is compared, and the id of its customer.';

create or replace function surety.labels_of_payment(p surety.payments) returns table (name text, value text)
language sql stable parallel safe
begin atomic
    select
        pairs.key as name,
        pairs.value
    from jsonb_each_text(surety.label_object(p.metadata, p.customer, p.customer_id)) as pairs;
end;

comment on function surety.labels_of_payment(surety.payments) is 'The labels of a payment, each in a row.';
